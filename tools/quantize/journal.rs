//! How a run that was interrupted goes on. Beside its files lies a journal (`NAME.resume`): a line about what the run is made of,
//! then one for every finished tensor with a checksum of its bytes. `--resume` starts after the last tensor whose bytes are really
//! there; nothing needs to be flushed on the way.

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::path::PathBuf;

use octet::disk::{self, part, rename_part, sync_folder};
use octet::error::{Error, Result};
use octet::gguf::hex;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::pipeline::{Error2, Errors, Run, slabs};
use crate::plan::Output;
use crate::source::{SourceTensor, type_bytes};

/// The journal of a run.
pub(crate) struct Journal {
    path: PathBuf,
    file: File,
    /// The errors of the tensors that an earlier run finished.
    pub(crate) done: Errors,
}

fn journal_path(outputs: &[Output]) -> PathBuf {
    disk::beside(&outputs[0].files[0].path, ".resume")
}

/// Whether a run that ended early left something for `--resume`.
pub(crate) fn resumable(outputs: &[Output]) -> bool {
    journal_path(outputs).exists()
}

/// What a run is made of: everything that the bytes of its outputs depend on.
fn fingerprint(run: &Run<'_>) -> Result<String> {
    let mut hash = Sha256::new();
    let mut text = |text: &str| {
        hash.update((text.len() as u64).to_le_bytes());
        hash.update(text);
    };
    text(env!("CARGO_PKG_VERSION"));
    text(if run.force { "force" } else { "" });
    for file in &run.source.files {
        text(&file.stamp());
    }
    for t in &run.source.tensors {
        text(&format!("{t:?}"));
    }
    for output in run.outputs {
        for file in &output.files {
            text(&file.path.to_string_lossy());
            let mut header = Vec::new();
            file.plan
                .write_header(&mut header)
                .map_err(Error::io(&file.path, "write"))?;
            hash_bytes(&mut text, &header);
        }
    }
    if let Some(file) = run.imatrix {
        for (name, entry) in &file.data.entries {
            text(name);
            hash_bytes(&mut text, bytemuck::cast_slice(&entry.sums));
            hash_bytes(&mut text, bytemuck::cast_slice(&entry.counts));
        }
    }
    Ok(hex(&hash.finalize()))
}

fn hash_bytes(text: &mut impl FnMut(&str), bytes: &[u8]) {
    text(&hex(&Sha256::digest(bytes)));
}

impl Journal {
    /// Starts a journal, or continues one.
    pub(crate) fn open(run: &Run<'_>) -> Result<Journal> {
        let first = &run.outputs[0].files[0].path;
        let path = journal_path(run.outputs);
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)
            .map_err(Error::io(first, "create"))?;
        if !disk::lock(&file) {
            return Err(Error::Usage(format!(
                "{}: another quantize is writing this file",
                first.display()
            )));
        }
        let mut journal = Journal {
            path: path.clone(),
            file,
            done: Vec::new(),
        };
        let print = fingerprint(run)?;
        let mut keep = 0;
        if run.resume {
            keep = journal.read(run, &print)?;
        }
        journal
            .file
            .set_len(keep)
            .and_then(|()| journal.file.seek(SeekFrom::Start(keep)))
            .map_err(Error::io(&path, "write"))?;
        if keep == 0 {
            let line = json!({ "octet": "quantize", "made_of": print });
            journal.line(&line)?;
        }
        Ok(journal)
    }

    /// Reads the journal of an earlier run and checks what it left; returns the journal's bytes to keep.
    fn read(&mut self, run: &Run<'_>, print: &str) -> Result<u64> {
        let failed = Error::io(&self.path, "read");
        // A line is a few hundred bytes; more is no journal.
        let limit = (run.source.tensors.len() as u64 + 1) * (512 + 256 * run.outputs.len() as u64);
        let mut lines = BufReader::new((&self.file).take(limit));
        let mut text = String::new();
        let mut next = |text: &mut String| {
            text.clear();
            let n = lines.read_line(text)?;
            Ok::<_, io::Error>(if text.ends_with('\n') { n as u64 } else { 0 })
        };
        let mut keep = next(&mut text).map_err(failed)?;
        if keep == 0 {
            return Ok(0); // Nothing there: a new start.
        }
        let head: Value = serde_json::from_str(&text).unwrap_or_default();
        if head["made_of"] != print {
            return Err(Error::invalid(
                &self.path,
                "what the unfinished file was made of",
                "the same source, options and version; without --resume it is made anew",
                "another",
            ));
        }
        for i in 0..run.source.tensors.len() {
            let n = next(&mut text).unwrap_or(0);
            let line: Value = match n {
                0 => break,
                _ => serde_json::from_str(&text).unwrap_or_default(),
            };
            let Some((errors, sums)) = parse_line(&line, run.outputs.len()) else {
                break;
            };
            let there = |(output, sum): (&Output, &u64)| {
                tensor_sum(output, i, &run.source.tensors[i]).is_ok_and(|found| found == *sum)
            };
            if !run.outputs.iter().zip(&sums).all(there) {
                break;
            }
            self.done.push(errors);
            keep += n;
        }
        Ok(keep)
    }

    fn line(&mut self, line: &Value) -> Result<()> {
        self.file
            .write_all(format!("{line}\n").as_bytes())
            .map_err(Error::io(&self.path, "write"))
    }

    pub(crate) fn add(&mut self, errors: &[Error2], sums: &[u64]) -> Result<()> {
        let errors: Vec<_> = errors
            .iter()
            .map(|e| json!([e.error, e.energy, e.count]))
            .collect();
        let sums: Vec<_> = sums.iter().map(|s| format!("{s:016x}")).collect();
        self.line(&json!({ "sums": sums, "errors": errors }))
    }

    /// Gives the outputs their names.
    pub(crate) fn finish(&self, outputs: &[Output]) -> Result<()> {
        for output in outputs {
            // The first of several last: it is what people open.
            for file in output.files.iter().rev() {
                rename_part(&file.path)?;
            }
            sync_folder(&output.files[0].path);
        }
        fs::remove_file(&self.path).map_err(Error::io(&self.path, "remove"))
    }

    /// Takes everything away that is unfinished.
    pub(crate) fn remove(&self, outputs: &[Output]) {
        for file in outputs.iter().flat_map(|o| &o.files) {
            let _ = fs::remove_file(part(&file.path));
        }
        let _ = fs::remove_file(&self.path);
    }
}

fn parse_line(line: &Value, outputs: usize) -> Option<(Vec<Error2>, Vec<u64>)> {
    let sums: Option<Vec<u64>> = line["sums"]
        .as_array()?
        .iter()
        .map(|s| u64::from_str_radix(s.as_str()?, 16).ok())
        .collect();
    let errors: Option<Vec<Error2>> = line["errors"]
        .as_array()?
        .iter()
        .map(|e| {
            Some(Error2 {
                // Not finite, and so not in JSON, where --force let such weights pass.
                error: e[0].as_f64().unwrap_or(f64::NAN),
                energy: e[1].as_f64().unwrap_or(f64::NAN),
                count: e[2].as_u64()?,
            })
        })
        .collect();
    let (sums, errors) = (sums?, errors?);
    (sums.len() == outputs && errors.len() == outputs).then_some((errors, sums))
}

/// The checksum of tensor `i`'s bytes in an unfinished output.
fn tensor_sum(output: &Output, i: usize, t: &SourceTensor) -> io::Result<u64> {
    let (no, at) = output.place(i);
    let target = &output.files[no];
    let mut file = File::open(part(&target.path))?;
    file.seek(SeekFrom::Start(target.plan.tensors[at].offset))?;
    let row = type_bytes(output.types[i], t.columns());
    let mut bytes = Vec::new();
    let mut sum = 0;
    for rows in slabs(t) {
        bytes.resize(((rows.end - rows.start) * row) as usize, 0);
        file.read_exact(&mut bytes)?;
        sum = disk::checksum(sum, &bytes);
    }
    Ok(sum)
}
