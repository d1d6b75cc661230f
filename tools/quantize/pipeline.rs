//! Read, encode, write, in bounded memory.
//!
//! A tensor is worked in slabs of a few million weights, and a slab in chunks of rows, one task each: a
//! worker reads a chunk's rows, decodes them once, encodes them for every output. Meanwhile one thread
//! writes the slab before. What lives at a time is a chunk of floats per worker and three slabs of encoded
//! bytes, whatever the size of the model.
//!
//! Files are written as `NAME.part`, flushed to the disk and then renamed, so that an interrupted run leaves an old file as
//! it was; how it goes on, `journal.rs` says.

use std::cell::RefCell;
use std::fs::{File, OpenOptions};
use std::io::{self, BufWriter, Seek, SeekFrom, Write};
use std::ops::Range;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use octet::disk::{self, part};
use octet::error::{Error, Result};
use octet::pool::Pool;
use octet::quant::Format;
use octet::simd::encode::Encoder;

use crate::journal::Journal;
use crate::plan::{ImatrixFile, Output};
use crate::source::{Source, SourceTensor, is_float, type_bytes};

/// Weights of a slab: what is written at a time. Part of the journal's checksums: a change makes old
/// journals useless, which their fingerprint tells by the program's version.
const SLAB: u64 = 8 << 20;

/// Weights of a chunk: what a worker encodes at a time. With rows of 4096 there are 64 chunks in a slab, so
/// that workers end a slab at about the same time.
const CHUNK: u64 = 128 << 10;

/// Weights of a tensor whose error is measured. Of larger tensors only some rows are, evenly spread:
/// the error of a few million weights is that of all within a tenth of a percent, and measuring costs as
/// much as Q8_0 does.
const MEASURED: u64 = 4 << 20;

/// What became of a tensor's weights in one output.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Error2 {
    /// `Σ (x - y)²` over the measured weights.
    pub(crate) error: f64,
    /// `Σ x²` over the same.
    pub(crate) energy: f64,
    /// How many were measured.
    pub(crate) count: u64,
}

impl Error2 {
    /// Adds another part.
    pub(crate) fn add(&mut self, other: &Error2) {
        self.error += other.error;
        self.energy += other.energy;
        self.count += other.count;
    }

    /// The root of the mean square error; `None` where the weights were copied.
    pub(crate) fn rms(&self) -> Option<f64> {
        (self.count > 0).then(|| (self.error / self.count as f64).sqrt())
    }

    /// The error's share of the weights' own root mean square.
    pub(crate) fn relative(&self) -> Option<f64> {
        (self.count > 0 && self.energy > 0.0).then(|| (self.error / self.energy).sqrt())
    }
}

/// How it is done.
pub(crate) struct Run<'a> {
    /// What is read.
    pub(crate) source: &'a Source,
    /// What is written.
    pub(crate) outputs: &'a [Output],
    /// What is known of columns.
    pub(crate) imatrix: Option<&'a ImatrixFile>,
    /// Whether weights that are no numbers are let pass.
    pub(crate) force: bool,
    /// Whether a journal is continued.
    pub(crate) resume: bool,
    /// Workers.
    pub(crate) pool: &'a Pool,
    /// Their instructions.
    pub(crate) encoder: Encoder,
    /// Set when the user wants it to end.
    pub(crate) stop: &'a AtomicBool,
    /// Told how many bytes of the source were read.
    pub(crate) progress: &'a (dyn Fn(u64) + Sync),
}

/// The errors of each tensor (outer) in each output (inner).
pub(crate) type Errors = Vec<Vec<Error2>>;

impl Run<'_> {
    /// Writes the outputs. The second result is how many tensors an earlier run had finished.
    ///
    /// # Errors
    /// If a source cannot be read or changes, if a weight is no number, if an output cannot be written, if the
    /// user interrupts. An unfinished output stays for `--resume` where that can help.
    pub(crate) fn write(&self) -> Result<(Errors, usize)> {
        let mut journal = Journal::open(self)?;
        let result = self.write_all(&mut journal);
        if let Err(e) = &result
            && !matches!(e, Error::Io { .. } | Error::Interrupted)
        {
            // Continuing would come to the same end.
            journal.remove(self.outputs);
        }
        result
    }

    fn write_all(&self, journal: &mut Journal) -> Result<(Errors, usize)> {
        let mut errors = std::mem::take(&mut journal.done);
        let resumed = errors.len();
        let mut writers = Vec::new();
        for output in self.outputs {
            writers.push(Sink::open(output, resumed)?);
        }
        for t in &self.source.tensors[..resumed] {
            (self.progress)(t.bytes());
        }
        // One slab is being written while one waits and one is encoded.
        let (to_writer, from_workers) = sync_channel(1);
        let (give_back, spare) = sync_channel(4);
        std::thread::scope(|scope| {
            let writing = scope.spawn(|| write_slabs(writers, from_workers, give_back, journal));
            let encoded = self.encode_all(resumed, &to_writer, &spare, &mut errors);
            drop(to_writer);
            let written = writing
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            // The writer's error comes first: the workers only see that it went away.
            written?;
            encoded
        })?;
        self.source.unchanged()?;
        journal.finish(self.outputs)?;
        Ok((errors, resumed))
    }

    fn encode_all(
        &self,
        from: usize,
        to_writer: &SyncSender<Message>,
        spare: &Receiver<Vec<Slab>>,
        errors: &mut Errors,
    ) -> Result<()> {
        for (i, t) in self.source.tensors.iter().enumerate().skip(from) {
            let importance = match self.imatrix {
                Some(file) => file.of(t)?,
                None => None,
            };
            let mut sums = vec![Error2::default(); self.outputs.len()];
            for rows in slabs(t) {
                if self.stop.load(Ordering::Relaxed) {
                    return Err(Error::Interrupted);
                }
                let mut slab = spare.try_recv().unwrap_or_default();
                slab.resize_with(self.outputs.len(), Slab::default);
                let chunks =
                    self.encode_slab(i, t, rows.clone(), importance.as_deref(), &mut slab)?;
                for chunk in &chunks {
                    for (sum, error) in sums.iter_mut().zip(chunk) {
                        sum.add(error);
                    }
                }
                let end = (rows.end == t.rows()).then(|| sums.clone());
                if to_writer
                    .send(Message {
                        tensor: i,
                        slab,
                        end,
                    })
                    .is_err()
                {
                    return Ok(()); // The writer failed and says why.
                }
                (self.progress)(t.bytes() / t.rows() * (rows.end - rows.start));
            }
            errors.push(sums);
        }
        Ok(())
    }

    /// Encodes some rows of tensor `i` for every output; returns the errors of each chunk.
    fn encode_slab(
        &self,
        i: usize,
        t: &SourceTensor,
        rows: Range<u64>,
        importance: Option<&[f32]>,
        slab: &mut [Slab],
    ) -> Result<Vec<Vec<Error2>>> {
        struct Task<'a> {
            rows: Range<u64>,
            out: Vec<&'a mut [u8]>,
            result: Result<Vec<Error2>>,
        }
        let mut tasks: Vec<Task> = chunks(t, &rows)
            .map(|rows| Task {
                rows,
                out: Vec::with_capacity(slab.len()),
                result: Ok(Vec::new()),
            })
            .collect();
        for (slab, output) in slab.iter_mut().zip(self.outputs) {
            let row = type_bytes(output.types[i], t.columns());
            let mut rest = slab.sized(((rows.end - rows.start) * row) as usize);
            for task in &mut tasks {
                let bytes = (task.rows.end - task.rows.start) * row;
                let (own, others) = rest.split_at_mut(bytes as usize);
                task.out.push(own);
                rest = others;
            }
        }
        self.pool.each(&mut tasks, |_, task| {
            task.result = SCRATCH.with_borrow_mut(|scratch| {
                self.encode_chunk(i, t, task.rows.clone(), importance, &mut task.out, scratch)
            });
        });
        // The first chunk's error, so that the message does not depend on the threads.
        tasks.into_iter().map(|task| task.result).collect()
    }

    fn encode_chunk(
        &self,
        i: usize,
        t: &SourceTensor,
        rows: Range<u64>,
        importance: Option<&[f32]>,
        out: &mut [&mut [u8]],
        scratch: &mut Scratch,
    ) -> Result<Vec<Error2>> {
        let columns = t.columns() as usize;
        let n = (rows.end - rows.start) as usize;
        let per_piece = t.rows() / t.pieces.len() as u64;
        let piece = &t.pieces[(rows.start / per_piece) as usize];
        let row_bytes = t.row_bytes(piece) as usize;
        let file = &self.source.files[piece.file];
        let raw = scratch.raw.sized(n * row_bytes);
        let within = rows.start % per_piece;
        if t.heads.is_some() {
            for (r, raw) in (within..).zip(raw.chunks_exact_mut(row_bytes)) {
                file.read(piece.offset + t.source_row(r) * row_bytes as u64, raw)?;
            }
        } else {
            file.read(piece.offset + within * row_bytes as u64, raw)?;
        }

        let format = Format::from_id(piece.type_id);
        let converts = |output: &Output| output.types[i] != piece.type_id;
        let check = is_float(piece.type_id) && !self.force;
        let mut errors = vec![Error2::default(); self.outputs.len()];
        let x = &mut scratch.x;
        if check || self.outputs.iter().any(converts) {
            x.resize(n * columns, 0.0);
            let format = format.expect("the plan converts only what can be decoded");
            self.encoder.decode(format, raw, x);
            if !self.force {
                self.check(t, &rows, x)?;
            }
        }
        // Importance belongs to the matrix, of which a fused tensor has several.
        let size = |dim| t.shape.get(dim).copied().unwrap_or(1);
        let matrix = (rows.start / size(1) % size(2)) as usize;
        let importance = importance.map(|all| &all[matrix * columns..][..columns]);
        for (o, output) in self.outputs.iter().enumerate() {
            let (before, out) = out.split_at_mut(o);
            let out = &mut *out[0];
            // Mixtures have much in common: what another output has is not made again.
            let same = |other: &Output| other.types[i] == output.types[i];
            if let Some(other) = self.outputs[..o].iter().position(same) {
                out.copy_from_slice(before[other]);
                errors[o] = errors[other];
                continue;
            }
            if !converts(output) {
                out.copy_from_slice(raw);
                continue;
            }
            let format = Format::from_id(output.types[i]).expect("the plan encodes known formats");
            let row_out = format.row_bytes(columns);
            match importance {
                Some(w) => {
                    for (x, out) in x.chunks_exact(columns).zip(out.chunks_exact_mut(row_out)) {
                        self.encoder.encode(format, x, Some(w), out);
                    }
                }
                None => self.encoder.encode(format, x, None, out),
            }
            errors[o] =
                self.measure(t, &rows, format, x, out, &mut scratch.coded, &mut scratch.y)?;
        }
        Ok(errors)
    }

    /// Refuses weights that are no numbers.
    fn check(&self, t: &SourceTensor, rows: &Range<u64>, x: &[f32]) -> Result<()> {
        const EXPONENT: u32 = 0x7f80_0000;
        // Without a branch, so that it is vectorized.
        let bad = x
            .iter()
            .fold(false, |bad, x| bad | (x.to_bits() & EXPONENT == EXPONENT));
        if !bad {
            return Ok(());
        }
        let at = x.iter().position(|x| !x.is_finite()).unwrap_or(0) as u64;
        let (row, column) = (rows.start + at / t.columns(), at % t.columns());
        Err(Error::invalid(
            &self.source.path,
            format!(
                "the weight at row {row}, column {column} of tensor {}",
                t.name
            ),
            "a finite number (--force lets it pass)",
            x[at as usize],
        ))
    }

    /// The error of some of the rows that were just encoded.
    fn measure(
        &self,
        t: &SourceTensor,
        rows: &Range<u64>,
        format: Format,
        x: &[f32],
        out: &[u8],
        coded: &mut Aligned,
        y: &mut Vec<f32>,
    ) -> Result<Error2> {
        if format == Format::F32 {
            return Ok(Error2::default()); // Nothing can be lost.
        }
        let columns = t.columns() as usize;
        let row_bytes = format.row_bytes(columns);
        let every = (t.elements() / MEASURED).max(1);
        let mut sum = Error2::default();
        y.resize(columns, 0.0);
        let pairs = x.chunks_exact(columns).zip(out.chunks_exact(row_bytes));
        for (_, (x, out)) in (rows.start..).zip(pairs).filter(|(r, _)| r % every == 0) {
            let coded = coded.sized(row_bytes);
            coded.copy_from_slice(out);
            self.encoder.decode(format, coded, y);
            let (mut error, mut energy) = ([0.0f32; 16], [0.0f32; 16]);
            // Rows are short enough for single precision, in 16 sums.
            for (x, y) in x.chunks(16).zip(y.chunks(16)) {
                for (l, (x, y)) in x.iter().zip(y).enumerate() {
                    error[l] += (x - y) * (x - y);
                    energy[l] += x * x;
                }
            }
            sum.error += error.iter().map(|&e| f64::from(e)).sum::<f64>();
            sum.energy += energy.iter().map(|&e| f64::from(e)).sum::<f64>();
            sum.count += columns as u64;
        }
        // Squares of large but finite weights may overflow single precision; that is no fault.
        if !sum.error.is_finite() && y.iter().any(|y| !y.is_finite()) && !self.force {
            return Err(Error::invalid(
                &self.source.path,
                format!("tensor {} as {}", t.name, format.name()),
                "weights within its range (--force lets them pass)",
                "larger ones",
            ));
        }
        Ok(sum)
    }
}

/// The rows of each slab: whole chunks, as far as these go.
pub(crate) fn slabs(t: &SourceTensor) -> impl Iterator<Item = Range<u64>> + use<> {
    let per = (SLAB / t.columns()).max(1);
    let rows = t.rows();
    (0..rows.div_ceil(per)).map(move |i| i * per..rows.min((i + 1) * per))
}

/// The rows of each chunk of a slab: none reaches from one matrix, or one piece, into the next.
fn chunks(t: &SourceTensor, slab: &Range<u64>) -> impl Iterator<Item = Range<u64>> + use<> {
    let per = (CHUNK / t.columns()).max(1);
    let matrix = t.shape.get(1).copied().unwrap_or(1);
    let Range { mut start, end } = slab.clone();
    std::iter::from_fn(move || {
        let border = (start / matrix + 1) * matrix;
        let stop = end.min(start + per).min(border);
        let rows = start..stop;
        start = stop;
        (!rows.is_empty()).then_some(rows)
    })
}

/// Bytes at an address that suits the blocks of every format.
#[derive(Default)]
struct Aligned {
    words: Vec<u64>,
}

impl Aligned {
    fn sized(&mut self, bytes: usize) -> &mut [u8] {
        let words = bytes.div_ceil(8);
        if self.words.len() < words {
            self.words.resize(words, 0);
        }
        &mut bytemuck::cast_slice_mut(&mut self.words[..words])[..bytes]
    }
}

#[derive(Default)]
struct Scratch {
    /// Rows as they are read.
    raw: Aligned,
    /// The same as floats.
    x: Vec<f32>,
    /// A row as it was encoded, and what that decodes to.
    coded: Aligned,
    y: Vec<f32>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// Encoded rows of one output.
#[derive(Default)]
struct Slab {
    bytes: Aligned,
    len: usize,
}

impl Slab {
    fn sized(&mut self, len: usize) -> &mut [u8] {
        self.len = len;
        self.bytes.sized(len)
    }

    fn get(&self) -> &[u8] {
        &bytemuck::cast_slice(&self.bytes.words)[..self.len]
    }
}

/// A slab of every output on its way to the disk.
struct Message {
    tensor: usize,
    slab: Vec<Slab>,
    /// With a tensor's last slab: its errors in every output.
    end: Option<Vec<Error2>>,
}

/// The writing thread.
fn write_slabs(
    mut sinks: Vec<Sink<'_>>,
    slabs: Receiver<Message>,
    give_back: SyncSender<Vec<Slab>>,
    journal: &mut Journal,
) -> Result<()> {
    for Message { tensor, slab, end } in slabs {
        for (sink, slab) in sinks.iter_mut().zip(&slab) {
            sink.write(tensor, slab.get())?;
        }
        if let Some(errors) = end {
            let sums: Vec<u64> = sinks
                .iter_mut()
                .map(|sink| sink.end(tensor))
                .collect::<Result<_>>()?;
            journal.add(&errors, &sums)?;
        }
        let _ = give_back.try_send(slab);
    }
    sinks.iter_mut().try_for_each(Sink::sync)
}

/// Where one output goes.
struct Sink<'a> {
    output: &'a Output,
    /// The file that is open, its number, and its path.
    file: Option<(File, usize)>,
    sum: u64,
}

impl<'a> Sink<'a> {
    /// Makes the files of an output, or continues them after `done` tensors.
    fn open(output: &'a Output, done: usize) -> Result<Sink<'a>> {
        let mut sink = Sink {
            output,
            file: None,
            sum: 0,
        };
        if done > 0 {
            let (no, at) = output.place(done - 1);
            let target = &output.files[no];
            let path = part(&target.path);
            let open = |file: io::Result<File>| file.map_err(Error::io(&path, "open"));
            let mut file = open(OpenOptions::new().read(true).write(true).open(&path))?;
            let t = &target.plan.tensors[at];
            let end = t.offset + t.bytes;
            file.set_len(end)
                .and_then(|()| file.seek(SeekFrom::Start(end)))
                .and_then(|_| target.plan.write_padding(at, &file))
                .map_err(Error::io(&path, "write"))?;
            sink.file = Some((file, no));
        }
        Ok(sink)
    }

    fn path(&self) -> PathBuf {
        let no = self.file.as_ref().map_or(0, |(_, no)| *no);
        part(&self.output.files[no].path)
    }

    fn write(&mut self, tensor: usize, bytes: &[u8]) -> Result<()> {
        let (no, _) = self.output.place(tensor);
        if self.file.as_ref().is_none_or(|(_, open)| *open != no) {
            self.sync()?;
            let target = &self.output.files[no];
            let path = part(&target.path);
            let file = File::create(&path).map_err(Error::io(&path, "create"))?;
            let mut buffered = BufWriter::new(&file);
            target
                .plan
                .write_header(&mut buffered)
                .and_then(|()| buffered.flush())
                .map_err(Error::io(&path, "write"))?;
            drop(buffered);
            self.file = Some((file, no));
        }
        let path = self.path();
        let (file, _) = self.file.as_mut().expect("opened above");
        file.write_all(bytes).map_err(Error::io(&path, "write"))?;
        self.sum = disk::checksum(self.sum, bytes);
        Ok(())
    }

    /// Ends a tensor; returns the checksum of its bytes.
    fn end(&mut self, tensor: usize) -> Result<u64> {
        let (no, at) = self.output.place(tensor);
        let path = self.path();
        let (file, _) = self.file.as_mut().expect("a tensor has bytes");
        self.output.files[no]
            .plan
            .write_padding(at, file)
            .map_err(Error::io(&path, "write"))?;
        Ok(std::mem::take(&mut self.sum))
    }

    /// Flushes the open file to the disk.
    fn sync(&mut self) -> Result<()> {
        let path = self.path();
        match &self.file {
            Some((file, _)) => file.sync_all().map_err(Error::io(&path, "write")),
            None => Ok(()),
        }
    }
}
