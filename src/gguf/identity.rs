//! Which model a file holds, told without reading all of it.

use super::{Gguf, Tensor};
use sha2::{Digest, Sha256};

/// Tensors that are looked into, evenly chosen …
const TENSORS: usize = 64;
/// … and the bytes taken from the middle of each.
const SAMPLE: usize = 4096;

impl Gguf {
    /// A SHA-256 that two files share only if they are the same model in the same format: over every file's length and whole header
    /// (all metadata, all tensors' names, types, shapes and places), and over `SAMPLE` bytes from the middle
    /// of up to `TENSORS` tensors, which tell finetunes with equal headers apart. Where the file lies and what it is
    /// called does not matter. Touches at most a few hundred kilobytes of weights.
    pub fn identity(&self) -> [u8; 32] {
        let mut hash = Sha256::new();
        for header in self.headers() {
            hash.update((header.len() as u64).to_le_bytes());
            hash.update(header);
        }
        hash.update(self.file_bytes().to_le_bytes());
        let tensors: &[Tensor] = self.tensors();
        for tensor in tensors
            .iter()
            .step_by(tensors.len().div_ceil(TENSORS).max(1))
        {
            let bytes = self.bytes(tensor);
            let start = bytes.len().saturating_sub(SAMPLE) / 2;
            hash.update(&bytes[start..bytes.len().min(start + SAMPLE)]);
        }
        hash.finalize().into()
    }
}

/// Bytes, such as a hash, as people write them.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::super::Writer;
    use super::*;

    fn identity(name: &str, key: u32, weight: u8) -> [u8; 32] {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(name);
        let mut writer = Writer::new();
        writer.put("general.key", key).tensor("a", 24, &[100_000]);
        let mut out = writer.start(&path, Vec::new()).unwrap();
        let mut weights = vec![1; 100_000];
        weights[50_000] = weight;
        out.write_tensor("a", &weights).unwrap();
        std::fs::write(&path, out.finish().unwrap()).unwrap();
        Gguf::open(&path).unwrap().identity()
    }

    #[test]
    fn it_follows_the_content_and_not_the_name() {
        let one = identity("a.gguf", 1, 1);
        assert_eq!(one, identity("b.gguf", 1, 1));
        assert_ne!(one, identity("a.gguf", 2, 1));
        assert_ne!(one, identity("a.gguf", 1, 2));
    }
}
