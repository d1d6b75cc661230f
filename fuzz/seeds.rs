//! Writes the small valid inputs of every entry to `corpus/NAME/`.

#[path = "../tests/entries.rs"]
mod entries;

fn main() -> std::io::Result<()> {
    let corpus = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus");
    for entry in entries::ENTRIES {
        let folder = corpus.join(entry.name);
        std::fs::create_dir_all(&folder)?;
        for (i, seed) in (entry.seeds)().iter().enumerate() {
            std::fs::write(folder.join(format!("seed{i}")), seed)?;
        }
    }
    Ok(())
}
