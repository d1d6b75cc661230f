//! `octet bench`: its sweeps and its forms. How fast anything is, no test asks.

use crate::program::Home;

/// The shortest rounds there are.
const SHORT: [&str; 5] = ["bench", "-r", "1", "-n", "2"];

#[test]
fn every_combination_is_measured() {
    let home = Home::new();
    let sweep = ["-p", "3,5", "-t", "1,2", "-d", "0,4", "--kv", "f16,f32"];
    let out = home.octet(&[&SHORT[..], &sweep, &["--ubatch", "2", "--json"]].concat());
    let doc = out.json();
    let results = doc["results"].as_array().unwrap();
    let mut seen = Vec::new();
    for result in results {
        let of = |key: &str| result[key].as_u64().unwrap();
        seen.push((
            of("threads"),
            of("depth"),
            of("p"),
            result["kv"].to_string(),
        ));
        assert_eq!((of("n"), of("ubatch")), (2, 2));
        for key in ["prefill_tok_s", "decode_tok_s", "gb_s", "prefill_gmac_s"] {
            assert!(result[key].as_f64().unwrap() > 0.0, "{key}: {result}");
        }
        for key in ["prefill_of_int8", "decode_of_read"] {
            // More than 1 where the model fits the caches.
            assert!(result[key].as_f64().unwrap() > 0.0, "{key}: {result}");
        }
    }
    seen.sort();
    seen.dedup();
    assert_eq!(seen.len(), 16, "{doc}");
    assert_eq!(doc["machine"]["threads"], results[0]["threads"]);
}

#[test]
fn phases_can_be_left_out() {
    let home = Home::new();
    let json = |args: &[&str]| {
        let out = home.octet(&[&["bench", "-r", "1", "--json"], args].concat());
        out.json()["results"][0].clone()
    };
    let prefill = json(&["-p", "3", "-n", "0"]);
    assert!(prefill["prefill_tok_s"].is_f64() && prefill["decode_tok_s"].is_null());
    let decode = json(&["-p", "0", "-n", "2", "-d", "3"]);
    assert!(decode["prefill_tok_s"].is_null() && decode["gb_s"].is_f64());
    let nothing = home.octet(&["bench", "-p", "0", "-n", "0"]);
    assert!(nothing.error(2).contains("nothing to measure"));
    let long = home.octet(&["bench", "-p", "2000", "-n", "1", "-d", "100"]);
    assert!(long.error(1).contains("at most 2048 tokens, found 2101"));
}

#[test]
fn tables() {
    let home = Home::new();
    let run = |args: &[&str]| {
        let out = home.octet(&[&SHORT[..], &["-p", "3,4", "-t", "1"], args].concat());
        out.text().to_string()
    };
    // What does not change stands above the table.
    let plain = run(&[]);
    let head = plain.lines().next().unwrap();
    assert!(head.starts_with("model demo-Q4_K_M.gguf, isa "), "{plain}");
    assert!(head.ends_with(", threads 1, threads-batch 1, ubatch 512, kv f16, depth 0"));
    assert_eq!(plain.matches("prefill").count(), 2, "{plain}");
    assert_eq!(plain.matches("decode 2").count(), 2, "{plain}");
    let columns = |line: &str, by: char| line.matches(by).count();

    let markdown = run(&["--markdown", "--isa", "scalar,avx2"]);
    let rows: Vec<_> = markdown.lines().filter(|l| l.starts_with('|')).collect();
    let isas = if cfg!(target_arch = "x86_64") { 2 } else { 1 };
    assert_eq!(rows.len(), 2 + 4 * isas, "{markdown}");
    assert!(
        rows.iter()
            .all(|row| columns(row, '|') == columns(rows[0], '|'))
    );

    let csv = run(&["--csv"]);
    let mut lines = csv.lines();
    let titles = lines.next().unwrap();
    assert!(titles.starts_with("model,isa,threads,threads-batch,ubatch,kv,depth,test,tok/s,"));
    assert!(lines.all(|line| columns(line, ',') == columns(titles, ',')));
    assert_eq!(csv.lines().count(), 5);
}

#[test]
fn the_machine_alone() {
    let home = Home::new();
    let args = ["bench", "--bandwidth", "-t", "1,2"];
    let out = home.octet(&[&args[..], &["--json", "-m", "nowhere.gguf"]].concat());
    let doc = out.json();
    assert_eq!(doc["machines"].as_array().unwrap().len(), 2);
    for machine in doc["machines"].as_array().unwrap() {
        assert!(machine["read_gb_s"].as_f64().unwrap() > 0.0);
        assert!(machine["int8_gmac_s"].as_f64().unwrap() > 0.0);
    }
    assert_eq!(doc["machine"], doc["machines"][0]);
    let table = home.octet(&args);
    assert!(
        table.text().contains("read GB/s  int8 GMAC/s"),
        "{}",
        table.text()
    );
}
