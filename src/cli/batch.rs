//! `octet batch`: a file of requests, answered many at once, each of them once.

pub mod journal;
mod lines;

use super::interrupt::hear_interrupts;
use super::load::{Loaded, load_for};
use super::options::{AnswerOptions, PromptOptions, parse_size};
use super::progress::Progress;
use super::report::{batch_closing_line, note};
use crate::bounded;
use crate::chat::batch::{Batch, Done, Room};
use crate::chat::constraint::{Compiler, Constraint, Form};
use crate::chat::message::{Message, Role};
use crate::chat::request::{Answerer, Body, Defaults, Line, Object, Request, Told};
use crate::chat::sampler::Sampler;
use crate::chat::session::Finish;
use crate::chat::stops::AnswerText;
use crate::error::{Error, Result};
use crate::memory;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use std::collections::HashMap;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;

use journal::{Finished, Id, Journal, Mode};
use lines::{Input, Lines, MAX_LINE, Next, is_blank, line_hash};

/// Answer a file of requests, many at once: a line of JSON in, a line of JSON out.
#[derive(clap::Args, Clone, Debug)]
pub struct Args {
    /// Requests, one a line: OpenAI's batch form, or {"prompt": …} or {"messages": …} with options; - is standard input
    #[arg(value_name = "IN.jsonl")]
    pub input: PathBuf,
    /// Where the results go, one a line in OpenAI's batch form; - is standard output
    #[arg(short, long, value_name = "OUT.jsonl")]
    pub output: PathBuf,
    /// Continue the results that are there
    #[arg(long)]
    pub resume: bool,
    /// Write over the results that are there
    #[arg(long, conflicts_with = "resume")]
    pub force: bool,
    /// Write results as they come, not in the order of the requests
    #[arg(long)]
    pub unordered: bool,
    /// Most sequences that run at once; results do not depend on it
    #[arg(long, value_name = "N", default_value_t = 32, value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub parallel: u16,
    /// Most memory for the KV caches of all sequences, such as 4G [default: half of what the model leaves]
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub kv_ram: Option<u64>,
    /// What requests get that do not say.
    #[command(flatten)]
    pub answer: AnswerOptions,
    /// And this.
    #[command(flatten)]
    pub request: PromptOptions,
}

/// Most results that wait for those of earlier lines: each takes about a hundred bytes of memory.
const MAX_WAITING: usize = 100_000;

/// Caches get at least this much memory, and without `--kv-ram` at most so much.
const KV_RAM: std::ops::RangeInclusive<u64> = 512 << 20..=64 << 30;

/// Runs the command.
///
/// # Errors
/// If the model cannot be loaded, or input and output cannot be used; [`Error::Lines`] if a line has an error for a
/// result, [`Error::Interrupted`] after Ctrl-C.
pub fn run(args: &Args) -> Result<()> {
    let lines = Lines::check(args)?;
    let loaded = load_for(
        usize::from(args.parallel),
        &args.answer.model,
        &args.answer.machine,
    )?;
    let options = args.answer.sampling.sampler(loaded.model.config.n_vocab)?;
    let mut defaults = Defaults {
        system: args.answer.system.clone(),
        raw: args.request.raw,
        max_tokens: args.answer.predict.map(|n| n as usize),
        stops: args.request.stop.clone(),
        ignore_ends: args.request.ignore_eos,
        form: args.answer.form.read()?.map(|(form, _, text)| (form, text)),
        sampling: options,
    };
    let settings = hash(&format!(
        "{} {:?} {} {:?} {} {defaults:?}",
        env!("CARGO_PKG_VERSION"),
        loaded.file.identity(),
        loaded.ctx,
        args.answer.model.kv,
        args.unordered,
    ));
    // A line without a seed gets one of its own, the same in every run.
    let seed = defaults.sampling.seed.take().unwrap_or(0);
    let interrupted = hear_interrupts(Some(
        "stopping after this step; Ctrl-C once more ends at once",
    ))?;
    let mode = Mode {
        resume: args.resume,
        force: args.force,
        unordered: args.unordered,
        settings,
        most_lines: lines.bytes.unwrap_or(u64::MAX),
    };
    let (journal, finished) = Journal::open(&args.output, mode)?;
    let total = lines.count(&finished, args)?;
    let name = loaded.path.file_stem().unwrap_or(loaded.path.as_os_str());
    let mut work = Work {
        batch: Batch::new(&loaded.model, room(args, &loaded)),
        flights: HashMap::new(),
        names: HashMap::new(),
        answerer: Answerer {
            model: name.to_string_lossy().into_owned(),
            fingerprint: format!("fp_{settings:012x}"),
            tokenizer: &loaded.tokenizer,
        },
        done: finished.lines,
        failed: finished.failed,
        loaded: &loaded,
        forms: Forms::default(),
        defaults,
        settings,
        seed,
        journal,
        verbose: args.answer.machine.verbose,
    };
    let mut input = Input::open(&lines)?;
    let stopped = || interrupted.load(Ordering::Relaxed);
    let resumable = args.output != Path::new("-") && args.input != Path::new("-");
    let whole = work.answer_all(&mut input, args, &finished, total, stopped);
    let whole = whole.inspect_err(|e| {
        // Whatever is wrong with the files, such as a full disk, what is written stays written.
        if matches!(e, Error::Io { file, .. } if *file != args.input) && resumable {
            note("the results so far are kept; the same command with --resume goes on from here");
        }
    })?;
    let (done, failed) = (work.done, work.failed);
    match (done - finished.lines, failed - finished.failed) {
        (0, _) if !stopped() => note(format!(
            "nothing left to do: all {done} prompts have results"
        )),
        (n, failed) => {
            let failed = match failed {
                0 => String::new(),
                failed => format!(" ({failed} failed)"),
            };
            let lines = format!("{n} prompts{failed}");
            batch_closing_line(&lines, work.batch.totals(), loaded.model.machine());
        }
    }
    if !whole {
        let of = total.map_or(String::new(), |n| format!(" of {n}"));
        let how = match resumable {
            false => "",
            true => "; the same command with --resume goes on from here",
        };
        note(format!("{done}{of} results are kept{how}"));
        return Err(Error::Interrupted);
    }
    match failed {
        0 => Ok(()),
        _ => Err(Error::Lines {
            file: args.input.clone(),
            failed,
            of: done,
            reasons: "their results say why",
        }),
    }
}

/// The first bits of a SHA-256, as many as an [`Id`] says.
fn hash(bytes: &(impl AsRef<[u8]> + ?Sized)) -> u64 {
    digest(bytes) & Id::BITS
}

/// The first 64 bits of a SHA-256.
fn digest(bytes: &(impl AsRef<[u8]> + ?Sized)) -> u64 {
    let digest = Sha256::digest(bytes.as_ref());
    let first = digest.iter().take(8);
    first.fold(0, |h, b| h << 8 | u64::from(*b))
}

/// How much may run at once.
fn room(args: &Args, loaded: &Loaded) -> Room {
    let bytes = args.kv_ram.unwrap_or_else(|| {
        let part = match loaded.model.store().total() {
            // The rest is better used for experts.
            Some(ram) => ram / 8,
            None => {
                let model = loaded.file.file_bytes();
                memory::available().unwrap_or(0).saturating_sub(model) / 2
            }
        };
        part.clamp(*KV_RAM.start(), *KV_RAM.end())
    });
    let ubatch = args.answer.machine.ubatch as usize;
    Room {
        kv: args.answer.model.kv,
        ctx: loaded.ctx,
        ubatch: loaded.model.pass_tokens(ubatch),
        sequences: usize::from(args.parallel),
        kv_bytes: usize::try_from(bytes).unwrap_or(usize::MAX),
    }
}

/// A line as JSON. `bytes`: of the whole line, which may be more than was read.
fn parse(line: &[u8], bytes: u64) -> Result<Value, Refusal> {
    if bytes > MAX_LINE as u64 {
        let why = format!("it is too long (expected at most {MAX_LINE} bytes, found {bytes})");
        return Err(Refusal::new("line_too_long", why));
    }
    let text = str::from_utf8(line).map_err(|e| {
        let at = e.valid_up_to();
        let why = format!(
            "it is no text (expected valid UTF-8, found byte {:#04x} at offset {at})",
            line[at]
        );
        Refusal::new("invalid_utf8", why)
    })?;
    // Some editors begin a file with a mark of its encoding.
    let text = text.trim_start_matches('\u{feff}');
    bounded::json(text.as_bytes()).map_err(|e| {
        // Every line is line 1 of its own.
        let why = e.to_string().replace(" at line 1 column ", " at column ");
        Refusal::new("invalid_json", format!("it is no JSON ({why})"))
    })
}

/// A request that is being answered.
struct Flight<'a> {
    id: Id,
    custom_id: Option<String>,
    object: Object,
    logprobs: Option<usize>,
    seed: u64,
    /// [`Request::calls`].
    calls: Option<usize>,
    text: AnswerText<'a>,
    said: String,
}

/// Why a line has no answer.
struct Refusal {
    code: &'static str,
    why: String,
}

impl Refusal {
    fn new(code: &'static str, why: impl std::fmt::Display) -> Refusal {
        let why = why.to_string();
        Refusal { code, why }
    }
}

impl From<Error> for Refusal {
    fn from(e: Error) -> Refusal {
        let code = match e {
            Error::ContextFull { .. } => "context_length_exceeded",
            _ => "invalid_request",
        };
        Refusal::new(code, e)
    }
}

/// Forms of answers. Lines of one file often ask for the same one, and compiling it takes longer than a token.
#[derive(Default)]
struct Forms {
    compiler: Option<Compiler>,
    /// The last ones, the longest unused first.
    compiled: Vec<(Form, String, bool, Constraint)>,
}

impl Forms {
    fn get(
        &mut self,
        loaded: &Loaded,
        form: Form,
        text: String,
        continuing: bool,
    ) -> Result<Constraint> {
        const KEPT: usize = 8;
        let same = |(f, t, c, _): &(Form, String, bool, Constraint)| {
            (*f, t.as_str(), *c) == (form, text.as_str(), continuing)
        };
        let known = match self.compiled.iter().position(same) {
            Some(at) => self.compiled.remove(at),
            None => {
                let compiler = match self.compiler.take() {
                    Some(compiler) => compiler,
                    None => {
                        let stop = loaded.tokenizer.stop_ids();
                        Compiler::new(&loaded.tokenizer, &stop)?
                    }
                };
                let compiler = self.compiler.insert(compiler);
                let constraint = compiler.compile(form, "the request", &text, continuing)?;
                (form, text, continuing, constraint)
            }
        };
        if self.compiled.len() == KEPT {
            self.compiled.remove(0);
        }
        let constraint = known.3.clone();
        self.compiled.push(known);
        Ok(constraint)
    }
}

/// All that is under way.
struct Work<'a> {
    loaded: &'a Loaded,
    forms: Forms,
    defaults: Defaults,
    answerer: Answerer<'a>,
    settings: u64,
    /// What seeds of lines are made from.
    seed: u64,
    batch: Batch<'a>,
    /// By the number of the line.
    flights: HashMap<u64, Flight<'a>>,
    /// Digests of the lines' names for themselves, and which line had each first.
    names: HashMap<u64, u64>,
    journal: Journal,
    /// Lines that have results, and how many of these are errors; those of earlier runs count.
    done: u64,
    failed: u64,
    verbose: bool,
}

impl Work<'_> {
    /// Answers every line of the input that is not `finished`, of `total` if that is known; `false`: somebody `stopped` it.
    fn answer_all(
        &mut self,
        input: &mut Input,
        args: &Args,
        finished: &Finished,
        total: Option<u64>,
        stopped: impl Fn() -> bool,
    ) -> Result<bool> {
        let mut progress = Progress::of("", "prompts");
        let in_all = total.map_or(usize::MAX, |n| n as usize);
        progress.set(self.done as usize, in_all);
        let mut line = Vec::new();
        let mut number = 0;
        let mut more = true;
        while (more || !self.batch.is_empty()) && !stopped() {
            // Not too many at once: lines without work must not keep the others waiting.
            for _ in 0..args.parallel {
                let room = self.batch.has_room() && self.journal.waiting() < MAX_WAITING;
                if !more || !room {
                    break;
                }
                let next = input.next(&mut line, self.batch.is_empty());
                match next.map_err(Error::io(&args.input, "read"))? {
                    Next::Line(bytes) => {
                        number += 1;
                        if !is_blank(&line) {
                            self.take(number, &line, bytes, finished.has(number))?;
                        }
                    }
                    Next::NotYet => break,
                    Next::End => more = false,
                }
            }
            self.step()?;
            progress.tell(|| format!("{:.1} tok/s", self.batch.totals().answer_rate()));
            progress.set(self.done as usize, in_all);
        }
        progress.clear();
        Ok(!more && self.batch.is_empty())
    }

    /// Begins with a line, or writes why not, if it is not `finished`. `bytes`: of the whole line, which may be more than
    /// was read.
    fn take(&mut self, number: u64, line: &[u8], bytes: u64, finished: bool) -> Result<()> {
        let parsed = parse(line, bytes);
        let asked = parsed.as_ref().map(Line::new);
        let name = asked.as_ref().ok().and_then(|line| line.custom_id);
        let first = name.map(|name| *self.names.entry(digest(name)).or_insert(number));
        if finished {
            return Ok(());
        }
        let id = Id {
            settings: self.settings,
            line: number,
            text: line_hash(line, bytes),
        };
        if let Some(failed) = self.journal.expect(id)? {
            self.done += 1;
            self.failed += u64::from(failed);
            return Ok(());
        }
        let mut custom_id = name.map(str::to_string);
        let begun = match (asked, first) {
            (Err(refusal), _) => return self.refuse(id, None, refusal),
            (Ok(_), Some(first)) if first != number => {
                let why = format!("line {first} has the same custom_id");
                Err(Refusal::new("duplicate_custom_id", why))
            }
            (Ok(asked), _) => self.begin(id, asked.body, &mut custom_id),
        };
        match begun {
            Ok(()) => Ok(()),
            Err(refusal) => self.refuse(id, custom_id, &refusal),
        }
    }

    fn begin(
        &mut self,
        id: Id,
        body: Result<Body<'_>>,
        custom_id: &mut Option<String>,
    ) -> Result<(), Refusal> {
        let (tokenizer, n_vocab) = (&self.loaded.tokenizer, self.loaded.model.config.n_vocab);
        let template = &self.loaded.template;
        let request = Request::new(&body?, &self.defaults, tokenizer, template, n_vocab)?;
        let mut sampling = request.sampling;
        let own = || hash(&format!("seed {} line {}", self.seed, id.line));
        let seed = *sampling.seed.get_or_insert_with(own);
        let mut sampler = Sampler::for_text(sampling, tokenizer);
        if let Some((form, text)) = request.form {
            let continuing = request.object == Object::Text;
            sampler.constrain(Some(self.forms.get(self.loaded, form, text, continuing)?));
        }
        self.batch
            .add(id.line, request.prompt, sampler, request.limits)?;
        // A message begins anew; what follows a text goes on where it ends.
        let stream = match request.object {
            Object::Chat => tokenizer.stream(),
            Object::Text => tokenizer.stream_continuing(),
        };
        self.flights.insert(
            id.line,
            Flight {
                id,
                custom_id: custom_id.take(),
                object: request.object,
                logprobs: request.logprobs,
                seed,
                calls: request.calls,
                text: AnswerText::new(stream, request.stops),
                said: String::new(),
            },
        );
        Ok(())
    }

    /// A step of all that runs; writes the results of what ended.
    fn step(&mut self) -> Result<()> {
        let flights = &mut self.flights;
        let done = self.batch.step(|line, token| {
            let Some(flight) = flights.get_mut(&line) else {
                return ControlFlow::Break(());
            };
            flight.said += &flight.text.push(token);
            match flight.text.stopped() {
                true => ControlFlow::Break(()),
                false => ControlFlow::Continue(()),
            }
        })?;
        for done in done {
            self.answer(done)?;
        }
        self.journal.sync()
    }

    fn answer(&mut self, done: Done) -> Result<()> {
        let Some(mut flight) = self.flights.remove(&done.id) else {
            return Ok(());
        };
        let mut answer = match done.answer {
            Ok(answer) => answer,
            Err(e) => return self.refuse(flight.id, flight.custom_id, &e.into()),
        };
        flight.said += &flight.text.flush();
        let (template, tokenizer) = (&self.loaded.template, &self.loaded.tokenizer);
        let said = flight.said.as_str();
        // A broken call is the text that it is.
        let taken = flight.calls.filter(|_| answer.finish == Finish::Stop);
        let message = taken
            .and_then(|taken| {
                let message = template.message(tokenizer, &answer.tokens, said, taken);
                message.ok()
            })
            .unwrap_or_else(|| Message::new(Role::Assistant, said));
        if flight.text.stopped() {
            answer.finish = Finish::Stop;
        }
        let body = self.answerer.body(&Told {
            id: flight.id.to_string(),
            object: flight.object,
            logprobs: flight.logprobs,
            prompt_tokens: done.prompt_tokens,
            seed: flight.seed,
            message: &message,
            answer: &answer,
        });
        self.write(flight.id, flight.custom_id, 200, body, Value::Null)
    }

    fn refuse(&mut self, id: Id, custom_id: Option<String>, refusal: &Refusal) -> Result<()> {
        let message = format!("line {}: {}", id.line, refusal.why);
        if self.verbose {
            note(&message);
        }
        let body = json!({"error": {
            "message": message,
            "type": "invalid_request_error",
            "param": null,
            "code": refusal.code,
        }});
        let error = json!({"code": refusal.code, "message": message, "line": id.line});
        self.failed += 1;
        self.write(id, custom_id, 400, body, error)
    }

    /// A result's line without its id.
    fn write(
        &mut self,
        id: Id,
        custom_id: Option<String>,
        status: u16,
        body: Value,
        error: Value,
    ) -> Result<()> {
        let failed = !error.is_null();
        let rest = json!({
            "custom_id": custom_id,
            "response": {"status_code": status, "request_id": format!("req_{id}"), "body": body},
            "error": error,
        });
        self.done += 1;
        // The id comes first and the error last: they tell a result without reading all of it.
        let rest = rest.to_string().replacen('{', ",", 1);
        self.journal.put(id, &rest, failed)
    }
}
