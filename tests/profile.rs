//! `octet profile` and `octet plan`: what the router did against counts made in other ways, the pictures, and what
//! a machine is said to do. How fast it is, no test asks.

use std::collections::HashSet;
use std::fs;

use octet::chat::tokenizer::Tokenizer;
use octet::gguf::{Gguf, Imatrix};
use octet::moe::router::Choice;
use octet::moe::{Kv, KvType, Machine, Model, Observer, Profile, Run, Scratch, Want};
use serde_json::Value;

use crate::data;
use crate::program::{DEMO, Home};

/// The start of a text that has more than four chunks of 64 tokens.
fn text() -> String {
    let text = fs::read_to_string(data("valid.txt")).unwrap();
    text.chars().take(1200).collect()
}

/// Records four chunks of the text with the demo model.
fn record(home: &Home, output: &str, more: &[&str]) -> Profile {
    let (text, path) = (home.write("text.txt", text()), home.path(output));
    let four = ["profile", "-f", &text, "-c", "64", "--chunks", "4"];
    let output = ["-o", path.to_str().unwrap()];
    home.octet(&[&four[..], &output, more].concat()).text();
    Profile::read(&path).unwrap()
}

/// What a profile is made of, for each layer and token.
#[derive(Default)]
struct Seen {
    choices: Vec<Vec<HashSet<u32>>>,
    residual: Vec<Vec<f32>>,
}

impl Observer for Seen {
    fn residual(&mut self, layer: usize, rows: &[f32]) {
        self.residual.resize(layer + 1, Vec::new());
        self.residual[layer].extend(rows);
    }

    fn routed(&mut self, layer: usize, _: &[f32], choices: &[Choice]) {
        self.choices.resize(layer + 1, Vec::new());
        let sets = choices
            .chunks(2)
            .map(|c| c.iter().map(|c| c.expert).collect());
        self.choices[layer].extend(sets);
    }
}

/// What the router of `layer` chooses for a row of the residual stream, computed in f64.
fn choose(model: &Model, layer: usize, x: &[f32]) -> HashSet<u32> {
    let layer = &model.weights.layers[layer];
    let squares: f64 = x.iter().map(|x| f64::from(*x) * f64::from(*x)).sum();
    let scale = 1.0 / (squares / x.len() as f64 + f64::from(model.config.rms_eps)).sqrt();
    let router = layer.router.as_ref().unwrap();
    let mut row = vec![0.0; x.len()];
    let mut logits = Vec::new();
    for e in 0..model.config.n_expert {
        router.decode_row(e, &mut row);
        let terms = row.iter().zip(&layer.ffn_norm).zip(x);
        let sum: f64 = terms
            .map(|((r, w), x)| f64::from(*r) * f64::from(*w) * f64::from(*x))
            .sum();
        logits.push((sum * scale, e as u32));
    }
    logits.sort_by(|a, b| b.0.total_cmp(&a.0));
    logits[..2].iter().map(|(_, e)| *e).collect()
}

#[test]
fn counts_reuse_and_recall() {
    let home = Home::new();
    let profile = record(&home, "p.json", &["--kv", "f32"]);

    let file = Gguf::open(DEMO.as_ref()).unwrap();
    let model = Model::open(&file, Machine::new(1, None).unwrap()).unwrap();
    let tokenizer = Tokenizer::from_gguf(&file).unwrap();
    let bos = tokenizer.bos().unwrap();
    let tokens = [vec![bos], tokenizer.encode(&text())].concat();
    let (mut hits, mut pairs) = (vec![[0; 2]; 4], vec![[0; 2]; 4]);
    let mut counts = vec![vec![0; 8]; 4];
    for chunk in tokens.chunks_exact(64).take(4) {
        let tokens = [&[bos], &chunk[1..]].concat();
        let mut kv = Kv::new(&model.config, KvType::F32, 64);
        let mut seen = Seen::default();
        let run = Run {
            kv: &mut kv,
            tokens: &tokens,
            want: Want::Nothing,
        };
        model
            .observe(&mut [run], &mut Scratch::default(), &mut seen)
            .unwrap();
        for layer in 0..4 {
            let took = &seen.choices[layer];
            took.iter()
                .flatten()
                .for_each(|e| counts[layer][*e as usize] += 1);
            for two in took.windows(2) {
                pairs[layer][0] += two[1].intersection(&two[0]).count();
                pairs[layer][1] += 2;
            }
            if layer > 0 {
                let rows = seen.residual[layer - 1].chunks(model.config.d_model);
                for (took, row) in took.iter().zip(rows) {
                    hits[layer][0] += took.intersection(&choose(&model, layer, row)).count();
                    hits[layer][1] += 2;
                }
            }
        }
    }
    let share = |[n, of]: [usize; 2]| n as f64 / of as f64;
    assert_eq!((profile.tokens, profile.n_used), (256, 2));
    assert_eq!(profile.counts, counts);
    assert_eq!(profile.recall[0], None);
    for layer in 0..4 {
        assert_eq!(profile.reuse[layer], share(pairs[layer]), "layer {layer}");
        if let Some(recall) = profile.recall[layer] {
            // Two experts may be as likely as each other, to the precision of the computation.
            let expected = share(hits[layer]);
            assert!((recall - expected).abs() < 0.01, "{recall} {expected}");
            assert!(layer > 0 && recall > 0.25, "no better than chance");
        }
    }
    // What imatrix counts on another way.
    let (text, path) = (home.write("text.txt", text()), home.path("i.gguf"));
    let args = [
        "imatrix", "-f", &text, "-c", "64", "--chunks", "4", "--kv", "f32",
    ];
    home.octet(&[&args[..], &["-o", path.to_str().unwrap()]].concat())
        .text();
    let imatrix = Imatrix::read(&path).unwrap();
    for (layer, counts) in profile.counts.iter().enumerate() {
        let name = format!("blk.{layer}.ffn_down_exps.weight");
        assert_eq!(&imatrix.entries[&name].counts, counts);
    }
}

#[test]
fn one_profile_for_every_machine() {
    let home = Home::new();
    let made = record(&home, "a.json", &["--threads", "1"]);
    for more in [
        &["--threads", "3", "--ubatch", "7"][..],
        &["--isa", "scalar"],
    ] {
        assert_eq!(record(&home, "b.json", more), made, "{more:?}");
    }
}

#[test]
fn it_is_shown() {
    let home = Home::new();
    let made = record(&home, "p.json", &[]);
    let (path, svg) = (home.path("p.json"), home.path("p.svg"));
    let (path, svg) = (path.to_str().unwrap(), svg.to_str().unwrap());
    let text = home.octet(&["profile", "show", path, "--svg", svg]);
    let text = text.text();
    assert!(!text.contains('\x1b'), "no colours on a pipe");
    let head = "demo-Q4_K_M.gguf: 4 layers of 8 experts, 2 for each token; 256 tokens\n";
    assert!(text.starts_with(head), "{text}");
    let picture = fs::read_to_string(svg).unwrap();
    assert!(picture.starts_with("<svg ") && picture.ends_with("</svg>\n"));
    for layer in 0..4 {
        let numbers = (0..8).map(|e| format!("{:.1}", 100.0 * made.share(layer, e)));
        let numbers: Vec<_> = numbers.collect();
        let cells: String = numbers.iter().map(|n| format!(" {n:>5}")).collect();
        let reuse = format!("{:.0}%", 100.0 * made.reuse[layer]);
        let row = text
            .lines()
            .find(|l| l.starts_with(&format!("{layer:>5}{cells}")));
        assert!(row.unwrap_or_else(|| panic!("{text}")).contains(&reuse));
        for number in numbers.iter().chain([&reuse]) {
            assert!(picture.contains(&format!("\n{number}\n")), "{number}");
        }
    }
    let json = home.octet(&["profile", "show", path, "--json"]).json();
    let file: Value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
    assert_eq!(json, file);
    // The older counts of the same text are not in the way of the newer ones.
    assert_eq!(record(&home, "p.json", &[]), made);
}

#[test]
fn profiles_that_will_not_do() {
    let home = Home::new();
    let text = home.write("text.txt", text());
    let args = |more: &[&str]| home.octet(&[&["profile"], more].concat());
    assert!(
        args(&["-f", &text])
            .error(1)
            .contains("at least 512 tokens")
    );
    let nowhere = home.path("no/such/folder.json");
    let nowhere = nowhere.to_str().unwrap();
    let place = args(&["-f", &text, "-c", "64", "-o", nowhere]);
    assert!(place.error(1).contains("cannot create"));
    assert!(args(&["show", nowhere]).error(1).contains("cannot read"));
    assert!(args(&["show", &text]).error(1).contains("expected JSON"));
    assert_eq!(args(&[]).code, Some(2));
    assert_eq!(args(&["show"]).code, Some(2));

    record(&home, "p.json", &[]);
    let (profile, other) = (home.path("p.json"), data("demo-BF16.gguf"));
    let (profile, other) = (profile.to_str().unwrap(), other.to_str().unwrap());
    let foreign = home.octet(&["plan", other, "--profile", profile]);
    let line = foreign.error(1);
    assert!(
        line.contains("p.json: the routing profile is wrong (expected one of"),
        "{line}"
    );
}

#[test]
fn a_plan_for_much_and_for_little_memory() {
    let home = Home::new();
    let plan = |more: &[&str]| home.octet(&[&["plan", DEMO][..], more].concat());
    let number = |v: &Value| v.as_f64().unwrap_or_else(|| panic!("{v}"));

    let all = plan(&["--ram", "1G", "--json"]).json();
    assert_eq!(
        (&all["memory"]["slots"], &all["memory"]["experts"]),
        (&32.into(), &32.into())
    );
    assert_eq!(
        (
            number(&all["prediction"]["hit_rate"]),
            number(&all["prediction"]["disk_bytes_token"])
        ),
        (1.0, 0.0)
    );
    assert_eq!(all["limited_by"]["decode"], "memory");
    for key in ["disk_gb_s", "read_gb_s", "int8_gmac_s", "threads"] {
        assert!(number(&all["machine"][key]) > 0.0, "{key}");
    }

    // Everything but about half of the experts.
    let half = ["program", "dense", "kv", "scratch"].map(|key| number(&all["memory"][key]));
    let half = half.iter().sum::<f64>() + 16.0 * number(&all["memory"]["slot"]);
    let half = (half as u64).to_string();
    // What a document says against what follows from its sizes; the program's own differ from run to run.
    let slots = |plan: &Value| {
        let of = |key: &str| number(&plan["memory"][key]);
        let rest = of("budget") - of("program") - of("dense") - of("kv") - of("scratch");
        assert_eq!(of("slots"), (rest / of("slot")).floor(), "{plan}");
        assert!(of("slots") > 4.0 && of("slots") < 28.0, "{plan}");
        of("slots")
    };
    let some = plan(&["--ram", &half, "--json"]).json();
    assert_eq!(number(&some["prediction"]["hit_rate"]), slots(&some) / 32.0);
    assert!(number(&some["prediction"]["disk_bytes_token"]) > 0.0);
    let first = number(&some["prediction"]["first_token_s"]);
    assert!(number(&some["prediction"]["first_token_cold_s"]) >= first);

    // The demo model's routing is uneven: its favourites are found oftener than all are.
    let profile = record(&home, "p.json", &[]);
    let path = home.path("p.json");
    let known = [
        "--ram",
        &half,
        "--json",
        "--profile",
        path.to_str().unwrap(),
    ];
    let known = plan(&known).json();
    let (hits, slots) = (number(&known["prediction"]["hit_rate"]), slots(&known));
    assert_eq!(hits, profile.held(slots / 4.0));
    assert!(hits > slots / 32.0);

    let text = plan(&["--ram", &half]);
    let text = text.text();
    for part in [
        " of 32 experts",
        "of a token's experts",
        "decode ",
        "first token after 512",
    ] {
        assert!(text.contains(part), "{part}: {text}");
    }
}

#[test]
fn plans_that_cannot_be_made() {
    let home = Home::new();
    let plan = |more: &[&str]| home.octet(&[&["plan"], more].concat());
    let least = plan(&[DEMO, "--ram", "5M"]);
    let least = least.error(1);
    assert!(
        least.contains("memory budget is wrong (expected at least "),
        "{least}"
    );
    assert!(
        least.contains("--ram") && least.contains("--ctx"),
        "{least}"
    );
    assert_eq!(plan(&[DEMO, "--ram", "much"]).code, Some(2));
    assert_eq!(plan(&[]).code, Some(2));
    assert!(
        plan(&[DEMO, "--ctx", "9999"])
            .error(1)
            .contains("at most 2048")
    );
    assert!(plan(&["Cargo.toml"]).error(1).contains("GGUF"));
}
