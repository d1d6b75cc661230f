//! Importance files ("imatrix"): how much an error in each column of each matrix matters.
//!
//! Importance is the mean square of what a column was multiplied with while the model read some text.
//! Two forms exist, both of the reference (llama.cpp, `tools/imatrix`, `common/imatrix-loader.cpp`):
//!
//! - a GGUF with, for every matrix, `NAME.in_sum2` (sums of squares, `(columns, experts)`, F32) and
//!   `NAME.counts` (how many inputs were summed, `(1, experts)`, F32);
//! - older, little-endian without a magic: `i32` entries; per entry an `i32`-counted name, `i32` calls, an
//!   `i32`-counted list of `f32` (sums over calls); then, perhaps, `i32` chunks and an
//!   `i32`-counted name of the text.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::path::Path;

use super::{Gguf, MAGIC, MAX_NAME, Tensor, shown};
use crate::error::{Error, Result};
use crate::quant::Format;

/// What is known of one matrix.
#[derive(Clone, Debug, PartialEq)]
pub struct Importance {
    /// One number a column, expert after expert: finite, not negative.
    pub columns: Vec<f32>,
    /// How many inputs each expert had; one number for a matrix that all inputs go through, and in the old
    /// form, which does not tell.
    pub counts: Vec<u64>,
}

/// An importance file.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Imatrix {
    /// By the name of the matrix, such as `blk.0.ffn_down_exps.weight`.
    pub entries: BTreeMap<String, Importance>,
    /// The texts that it was made from.
    pub datasets: Vec<String>,
    /// Chunks of text that were read; 0 if the file does not say.
    pub chunks: u32,
}

/// An old file may have this many bytes; that of 8x22B has 30 MB.
const MAX_FILE: u64 = 1 << 31;

const SUMS: &str = ".in_sum2";
const COUNTS: &str = ".counts";

impl Imatrix {
    /// Reads an importance file of either form.
    ///
    /// # Errors
    /// If it cannot be read, is no such file, or holds numbers that are not finite or are negative.
    pub fn read(path: &Path) -> Result<Imatrix> {
        let mut start = Vec::new();
        let file = File::open(path).map_err(Error::io(path, "open"))?;
        (&file)
            .take(MAGIC.len() as u64)
            .read_to_end(&mut start)
            .map_err(Error::io(path, "read"))?;
        let found = if start == MAGIC {
            Imatrix::from_gguf(&Gguf::open(path)?)?
        } else {
            let len = file.metadata().map_err(Error::io(path, "read"))?.len();
            if len > MAX_FILE {
                let expected = format!("at most {MAX_FILE} bytes");
                return Err(Error::invalid(path, "the importance file", expected, len));
            }
            let mut bytes = start;
            (&file)
                .take(MAX_FILE)
                .read_to_end(&mut bytes)
                .map_err(Error::io(path, "read"))?;
            Imatrix::from_old(path, &bytes)?
        };
        if found.entries.is_empty() {
            let expected = "at least one matrix";
            return Err(Error::invalid(
                path,
                "the importance file",
                expected,
                "none",
            ));
        }
        for (name, entry) in &found.entries {
            let bad = |x: &&f32| !x.is_finite() || **x < 0.0;
            if let Some(bad) = entry.columns.iter().find(bad) {
                let what = format!("the importance of {}", shown(name));
                return Err(Error::invalid(path, what, "numbers of 0 or more", bad));
            }
        }
        Ok(found)
    }

    /// The importance of a tensor's columns: `(columns · experts)`, or `None` if nothing is known of it.
    ///
    /// An embedding, which is looked up rather than multiplied, may be without; so may one whose entry
    /// has another size, as an output matrix that it shares may have been measured.
    ///
    /// # Errors
    /// If what is known has another size than the tensor.
    pub fn of(&self, file: &Path, name: &str, shape: &[u64]) -> Result<Option<&[f32]>> {
        let Some(entry) = self.entries.get(name) else {
            return Ok(None);
        };
        let experts = shape.get(2).copied().unwrap_or(1);
        let want = shape.first().and_then(|k| k.checked_mul(experts));
        if want == Some(entry.columns.len() as u64) {
            return Ok(Some(&entry.columns));
        }
        if name == "token_embd.weight" {
            return Ok(None);
        }
        Err(Error::invalid(
            file,
            format!("the importance of {}", shown(name)),
            format!("{} numbers, one a column and expert", want.unwrap_or(0)),
            entry.columns.len(),
        ))
    }

    /// Experts that saw nothing: `(matrix, expert)`. Their columns count as equally important.
    pub fn unseen(&self) -> impl Iterator<Item = (&str, usize)> {
        self.entries.iter().flat_map(|(name, entry)| {
            let unseen = |(_, n): &(usize, &u64)| **n == 0;
            let experts = entry.counts.iter().enumerate().filter(unseen);
            experts.map(|(e, _)| (name.as_str(), e))
        })
    }

    fn from_gguf(file: &Gguf) -> Result<Imatrix> {
        let path = file.path();
        for key in [
            "imatrix.datasets",
            "imatrix.chunk_count",
            "imatrix.chunk_size",
        ] {
            if file.get(key).is_none() {
                let hint = "is this an importance file?";
                return Err(Error::missing(path, format!("metadata key {key}"), hint));
            }
        }
        let datasets = file.get_array("imatrix.datasets")?;
        let datasets = datasets.and_then(|a| Some(a.strs()?.map(str::to_string).collect()));
        let mut entries = BTreeMap::new();
        for sums in file.tensors() {
            let Some(name) = sums.name.strip_suffix(SUMS) else {
                continue;
            };
            let counts = file
                .tensor(&format!("{name}{COUNTS}"))
                .ok_or_else(|| Error::missing(path, format!("tensor {}", shown(name)), ""))?;
            let floats = |t: &Tensor| match t.format() {
                Some(Format::F32) => {
                    let bytes = file.bytes(t);
                    let floats = bytes.as_chunks::<4>().0.iter();
                    Ok(floats.map(|b| f32::from_le_bytes(*b)).collect::<Vec<_>>())
                }
                _ => Err(Error::invalid(
                    path,
                    format!("the type of tensor {}", shown(&t.name)),
                    "F32",
                    t.type_name(),
                )),
            };
            let (mut columns, counts) = (floats(sums)?, floats(counts)?);
            if counts.is_empty() || !columns.len().is_multiple_of(counts.len()) {
                return Err(Error::invalid(
                    path,
                    format!("the counts of {}", shown(name)),
                    format!("a divisor of {} sums", columns.len()),
                    counts.len(),
                ));
            }
            let width = columns.len() / counts.len();
            let mut whole = Vec::with_capacity(counts.len());
            for (columns, &count) in columns.chunks_exact_mut(width).zip(&counts) {
                if !(0.0..9e15).contains(&count) {
                    let what = format!("the counts of {}", shown(name));
                    return Err(Error::invalid(path, what, "numbers of 0 or more", count));
                }
                // Whole numbers, though stored as floats.
                let count = count.round();
                whole.push(count as u64);
                for x in columns {
                    *x = if count > 0.0 { *x / count } else { 1.0 };
                }
            }
            let counts = whole;
            entries.insert(name.to_string(), Importance { columns, counts });
        }
        Ok(Imatrix {
            entries,
            datasets: datasets.unwrap_or_default(),
            chunks: file.get_u32("imatrix.chunk_count")?.unwrap_or(0),
        })
    }

    fn from_old(path: &Path, bytes: &[u8]) -> Result<Imatrix> {
        let mut at = 0usize;
        let mut take = |what: &str, n: usize| {
            let start = at;
            let taken = bytes.get(start..).and_then(|rest| rest.get(..n));
            at += taken.map_or(0, <[u8]>::len);
            taken.ok_or_else(|| Error::Truncated {
                file: path.to_path_buf(),
                what: what.to_string(),
                at: start as u64,
                want: n as u64,
                have: (bytes.len() - start) as u64,
            })
        };
        let count = |bytes: &[u8]| i32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
        // A file of another kind mostly fails here.
        let sane = |what: &str, n: i32, low: usize, high: usize| match usize::try_from(n) {
            Ok(n) if (low..=high).contains(&n) => Ok(n),
            _ => Err(Error::invalid(
                path,
                format!("{what} of the importance file"),
                format!("{low} to {high}"),
                n,
            )),
        };
        let n = sane("the entries", count(take("the header", 4)?), 1, 1 << 20)?;
        let mut entries = BTreeMap::new();
        for i in 0..n {
            let what = format!("entry {i}");
            let len = sane("a name's length", count(take(&what, 4)?), 1, MAX_NAME)?;
            let name = String::from_utf8_lossy(take(&what, len)?).into_owned();
            let calls = sane("the calls", count(take(&what, 4)?), 0, i32::MAX as usize)?;
            let len = sane(
                "the columns",
                count(take(&what, 4)?),
                1,
                MAX_FILE as usize / 4,
            )?;
            let columns = take(&what, 4 * len)?.as_chunks::<4>().0.iter();
            let mean = |sum: f32| if calls > 0 { sum / calls as f32 } else { sum };
            let columns = columns.map(|b| mean(f32::from_le_bytes(*b))).collect();
            let counts = vec![calls.max(1) as u64];
            entries.insert(name, Importance { columns, counts });
        }
        // What follows is missing in the oldest files.
        let mut chunks = 0;
        let mut datasets = Vec::new();
        if let Ok(n) = take("chunks", 4) {
            chunks = u32::try_from(count(n)).unwrap_or(0);
            if let Ok(len) = take("the name of the text", 4).map(count)
                && let Ok(name) = take("the name of the text", usize::try_from(len).unwrap_or(0))
                && !name.is_empty()
            {
                datasets.push(String::from_utf8_lossy(name).into_owned());
            }
        }
        Ok(Imatrix {
            entries,
            datasets,
            chunks,
        })
    }
}
