//! Nothing leaves the machine: no part of the program can open a connection. (That files are for their owner's eyes, and
//! `--no-history`, is tested where these files are: `terminal.rs`, `sessions.rs`.)

use std::path::Path;
use std::process::Command;

/// Crates that speak over a network, or carry those that do; their relatives begin with the same words.
const NETWORK: &[&str] = &[
    "actix",
    "async-io",
    "async-std",
    "attohttpc",
    "aws-",
    "axum",
    "curl",
    "dns-lookup",
    "h2",
    "h3",
    "hf-hub",
    "hickory",
    "http",
    "hyper",
    "isahc",
    "libp2p",
    "lsp-",
    "minreq",
    "mio",
    "native-tls",
    "openssl",
    "polling",
    "quinn",
    "reqwest",
    "rustls",
    "schannel",
    "security-framework",
    "sentry",
    "smol",
    "socket2",
    "surf",
    "tiny_http",
    "tokio",
    "tonic",
    "tower",
    "trust-dns",
    "tungstenite",
    "ureq",
    "warp",
    "webpki",
    "websocket",
    "zmq",
];

#[test]
fn no_crate_of_the_default_build_speaks_over_a_network() {
    let cargo = |args: &[&str]| {
        let mut cargo = Command::new(env!("CARGO"));
        cargo.args(args).current_dir(env!("CARGO_MANIFEST_DIR"));
        cargo.output().unwrap()
    };
    // Without dev-dependencies, which are not in the programs; for all systems.
    let tree = || {
        let edges = ["tree", "--offline", "--locked", "--edges", "normal"];
        let form = ["--target", "all", "--prefix", "none", "--format", "{lib}"];
        cargo(&[&edges[..], &form].concat())
    };
    let mut listed = tree();
    if !listed.status.success() {
        // Where nothing else was ever built, crates that only other systems need were never fetched.
        cargo(&["fetch", "--locked"]);
        listed = tree();
    }
    let tree = listed;
    let said = String::from_utf8_lossy(&tree.stderr);
    assert!(tree.status.success(), "{said}");
    let tree = String::from_utf8(tree.stdout).unwrap();
    let crates: Vec<String> = tree.lines().map(|line| line.replace('_', "-")).collect();
    for ours in ["octet", "clap", "tokenizers", "minijinja", "windows-sys"] {
        assert!(crates.iter().any(|c| c == ours), "{ours} is not in {tree}");
    }
    for name in &crates {
        let network = NETWORK
            .iter()
            .find(|bad| name.starts_with(&bad.replace('_', "-")));
        assert!(network.is_none(), "{name} is in the default build");
    }
}

/// What a program asks of the system to reach another machine, or to be reached. (`socketpair`, `sendmsg` and `recvmsg` are in
/// Rust's library, which starts programs with them: two ends within a machine.)
const CALLS: &[&str] = &[
    "accept",
    "accept4",
    "bind",
    "connect",
    "getaddrinfo",
    "gethostbyname",
    "listen",
    "recvfrom",
    "sendto",
    "socket",
];

/// The names that a program takes from the libraries of the system, without their versions: the dynamic symbols of an ELF file.
#[cfg(all(target_os = "linux", target_pointer_width = "64"))]
fn symbols(elf: &[u8]) -> Vec<String> {
    let number = |at: usize, n: usize| {
        let bytes = elf[at..at + n].iter().rev();
        bytes.fold(0usize, |x, b| x << 8 | usize::from(*b))
    };
    let (table, size, n) = (number(0x28, 8), number(0x3a, 2), number(0x3c, 2));
    // Of a section: its kind, where it lies, its length, the section that belongs to it.
    let section = |i: usize| {
        let at = table + i * size;
        (
            number(at + 4, 4),
            number(at + 0x18, 8),
            number(at + 0x20, 8),
            number(at + 0x28, 4),
        )
    };
    const DYNSYM: usize = 11;
    let (_, at, len, strings) = (0..n).map(section).find(|s| s.0 == DYNSYM).unwrap();
    let (_, strings, ..) = section(strings);
    let name = |symbol: usize| {
        let start = strings + number(symbol, 4);
        let end = elf[start..].iter().position(|b| *b == 0).unwrap();
        String::from_utf8_lossy(&elf[start..start + end]).into_owned()
    };
    (at..at + len).step_by(24).map(name).collect()
}

#[cfg(all(
    target_os = "linux",
    target_pointer_width = "64",
    not(target_env = "musl")
))]
#[test]
fn the_programs_do_not_call_for_a_connection() {
    for program in [env!("CARGO_BIN_EXE_octet"), env!("CARGO_BIN_EXE_quantize")] {
        let symbols = symbols(&std::fs::read(program).unwrap());
        let has = |name: &str| symbols.iter().any(|symbol| symbol == name);
        assert!(has("write") && has("malloc"), "{program}: {symbols:?}");
        for call in CALLS {
            assert!(!has(call), "{program} has {call}");
        }
    }
}

#[test]
fn no_source_names_a_network() {
    fn look(path: &Path, seen: &mut usize) {
        if path.is_dir() {
            for entry in std::fs::read_dir(path).unwrap() {
                look(&entry.unwrap().path(), seen);
            }
        } else if path.extension().is_some_and(|e| e == "rs") {
            let text = std::fs::read_to_string(path).unwrap();
            *seen += 1;
            for word in [
                "std::net",
                "TcpStream",
                "UdpSocket",
                "UnixStream",
                "libc::connect",
            ] {
                assert!(!text.contains(word), "{} has {word}", path.display());
            }
        }
    }
    let mut seen = 0;
    for folder in ["src", "tools/quantize"] {
        look(
            &Path::new(env!("CARGO_MANIFEST_DIR")).join(folder),
            &mut seen,
        );
    }
    assert!(seen > 50, "{seen} files");
}
