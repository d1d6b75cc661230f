//! `--gpu-mem` and `--gpu`: with a GPU, without one, and without what octet needs to use one.

use crate::program::{DEMO, Home, Output};

fn ask(home: &Home, more: &[&str]) -> Output {
    let ask = [
        "run",
        "--raw",
        "-p",
        "Once upon a time",
        "-n",
        "12",
        "--temp",
        "0",
        "--json",
    ];
    home.octet(&[&ask[..], &["-m", DEMO], more].concat())
}

#[test]
fn a_program_without_the_feature_says_how_to_build_one_with_it() {
    let home = Home::new();
    for args in [
        &["--gpu-mem", "8G"][..],
        &["--gpu-mem", "auto"],
        &["--gpu", "0"],
    ] {
        let out = ask(&home, args);
        if cfg!(feature = "cuda") {
            assert_eq!(out.code, Some(0), "{}", out.stderr);
        } else {
            let line = out.error(2);
            assert!(
                line.contains("cargo build --release --features cuda"),
                "{line}"
            );
        }
    }
    assert_eq!(ask(&home, &["--gpu-mem", "0"]).code, Some(0));
    for bad in ["much", "0.5", "8X"] {
        let out = ask(&home, &["--gpu-mem", bad]);
        assert_eq!(out.code, Some(2));
        assert!(out.stderr.contains("auto or 0"), "{}", out.stderr);
    }
}

/// Where there is a GPU some of the work is done there; where there is none a line says why. The answer is the same.
#[test]
fn the_same_bits_with_a_gpu_or_a_word_why_there_is_none() {
    let home = Home::new();
    let alone = ask(&home, &["--gpu-mem", "0"]);
    assert!(!alone.stderr.contains("GPU"), "{}", alone.stderr);
    if !cfg!(feature = "cuda") {
        return;
    }
    for args in [
        &["--gpu-mem", "1G"][..],
        &["--gpu-mem", "auto", "--gpu", "99"],
    ] {
        let out = ask(&home, args);
        let said = out.stderr.clone();
        let (without, with) = ("no GPU, the CPU computes everything: ", "GPU: ");
        assert!(said.contains(without) || said.contains(with), "{said}");
        let (out, alone) = (out.json(), alone.json());
        for key in ["tokens", "text", "logits_hash"] {
            assert_eq!(out[key], alone[key], "{key}: {said}");
        }
    }
    // Nobody asked for one: no word.
    assert!(!ask(&home, &[]).stderr.contains("no GPU"));
}

/// What would lie on a GPU is told with or without one.
#[test]
fn a_plan_says_what_would_lie_on_a_gpu() {
    let home = Home::new();
    let out = home.octet(&["plan", DEMO, "--gpu-mem", "1G", "--json"]);
    if !cfg!(feature = "cuda") {
        let line = out.error(2);
        assert!(line.contains("--features cuda"), "{line}");
        return;
    }
    let gpu = &out.json()["gpu"];
    assert_eq!(
        (gpu["experts"].as_u64(), gpu["hit_rate"].as_f64()),
        (Some(32), Some(1.0))
    );
    assert_eq!(gpu["cpu_bytes_token"], 0.0);
    let out = home.octet(&["plan", DEMO, "--gpu-mem", "240M"]);
    let text = out.text();
    assert!(
        text.contains("On the GPU") && text.contains("of 32 experts"),
        "{text}"
    );
}

/// What of a file a GPU could have, and what not, is told without one; a program that could not use it says nothing.
#[test]
fn an_inspected_file_says_what_a_gpu_could_have() {
    let home = Home::new();
    let out = home.octet(&["inspect", DEMO]);
    let part = out.text().split("\nOn a GPU\n").nth(1);
    if !cfg!(feature = "cuda") {
        assert_eq!(part, None);
        return;
    }
    let part = part.unwrap();
    for line in [
        "  keys and values      1.00 KiB a token: 1048576 tokens in each GiB\n",
        "  experts              32 of 32, ",
    ] {
        assert!(part.contains(line), "{line}: {part}");
    }
    assert!(!part.contains("stays with the CPU"), "{part}");
    // Floats have no kernels there.
    let floats = home.octet(&["inspect", crate::data("demo-BF16.gguf").to_str().unwrap()]);
    let part = floats.text().split("\nOn a GPU\n").nth(1).unwrap();
    let line =
        "  stays with the CPU   keys and values, 32 of 32 experts; there are no kernels for BF16\n";
    assert!(part.contains(line), "{part}");
}
