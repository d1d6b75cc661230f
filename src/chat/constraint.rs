//! Answers that must have a form: a JSON schema, a grammar or a regular expression decides after each token which tokens may
//! come next.
//!
//! The parsing is the crate llguidance's. What is ours: the vocabulary as it wants it, limits for hostile grammars, errors
//! of one line, and the dummy space that an answer's first token may begin with.

use super::tokenizer::{PieceKind, SPACE, Tokenizer};
use super::{gbnf, schema};
use crate::bounded;
use crate::error::{Error, Result};
use llguidance::api::{GrammarInit, ParserLimits, TopLevelGrammar};
use llguidance::derivre::RegexAst;
use llguidance::earley::lexerspec::LexerSpec;
use llguidance::earley::{Grammar, SymbolProps};
use llguidance::toktrie::{SimpleVob, TokEnv, TokRxInfo, TokTrie, TokenizerEnv};
use llguidance::{Matcher, ParserFactory, panic_utils};
use regex_syntax::hir::{Hir, HirKind};
use serde_json::{Map, Value, json};
use std::fmt;
use std::panic::AssertUnwindSafe;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// What describes the form.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// A JSON Schema: the answer is a JSON value that it accepts.
    JsonSchema,
    /// A grammar in llguidance's dialect of Lark, which begins at the rule `start`; or in llama.cpp's GBNF, which begins at `root`.
    Grammar,
    /// A regular expression (of the crate `regex`) for the whole answer.
    Regex,
}

impl Form {
    /// What a user calls a text of this form.
    fn name(self) -> &'static str {
        match self {
            Form::JsonSchema => "the JSON schema",
            Form::Grammar => "the grammar",
            Form::Regex => "the regular expression",
        }
    }
}

/// Longer sources are refused: a schema of this size is already larger than any published one.
const MAX_SOURCE: usize = 8 << 20;
/// Most letters of an expression that are only there by repetition: each takes the parser half a kilobyte.
const MAX_SPELLED: u64 = 50_000;

/// Bounds for grammars of any origin. A mask stays below about 20 ms and the states below about 100 MB.
fn limits() -> ParserLimits {
    ParserLimits {
        max_lexer_states: 50_000,
        verbose_errors: false,
        ..ParserLimits::default()
    }
}

/// The vocabulary as the parser sees it.
struct Vocabulary {
    trie: TokTrie,
    tokenizer: Arc<Tokenizer>,
}

impl TokenizerEnv for Vocabulary {
    fn tok_trie(&self) -> &TokTrie {
        &self.trie
    }

    fn tokenize_bytes(&self, bytes: &[u8]) -> Vec<u32> {
        match std::str::from_utf8(bytes) {
            Ok(text) => self.tokenizer.encode_with(text, false, true),
            Err(_) => self.trie.greedy_tokenize(bytes),
        }
    }
}

/// Compiles grammars for one vocabulary. Making one takes a while (a tenth of a second for 32,000 tokens), so that it
/// is made when the first grammar comes.
pub struct Compiler {
    factory: ParserFactory,
    /// Tokens that begin with a space, and the tokens without, if there are any.
    spaced: Arc<Vec<(u32, Option<u32>)>>,
}

impl Compiler {
    /// For answers that end with one of `stop`.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for a vocabulary without a token that ends an answer.
    pub fn new(tokenizer: &Arc<Tokenizer>, stop: &[u32]) -> Result<Compiler> {
        let words: Vec<Vec<u8>> = (0..tokenizer.len() as u32)
            .map(|id| word(tokenizer, id))
            .collect();
        let stop: Vec<u32> = stop
            .iter()
            .copied()
            .filter(|id| (*id as usize) < words.len())
            .collect();
        let unusable = |what: &str, found: String| {
            Error::unsupported(tokenizer.source(), "an answer with a grammar", what, found)
        };
        let Some(&eos) = stop.first() else {
            let found = "a vocabulary without one".to_string();
            return Err(unusable("a token that ends an answer", found));
        };
        let info = TokRxInfo::new(words.len() as u32, eos);
        let trie = TokTrie::from(&info, &words).with_eos_tokens(&stop);
        let vocabulary: TokEnv = Arc::new(Vocabulary {
            trie,
            tokenizer: tokenizer.clone(),
        });
        let mut factory = ParserFactory::new_simple(&vocabulary).map_err(|e| {
            unusable(
                "a usual vocabulary",
                one_line(Form::Grammar, &e.to_string()),
            )
        })?;
        *factory.limits_mut() = limits();
        factory.quiet();
        let without = |text: &str| tokenizer.id(text).filter(|&id| tokenizer.is_text(id));
        let spaced = (0u32..)
            .zip(tokenizer.pieces())
            .filter(|(id, _)| tokenizer.is_text(*id))
            .filter_map(|(id, piece)| Some((id, without(piece.text.strip_prefix(SPACE)?))));
        Ok(Compiler {
            spaced: Arc::new(spaced.collect()),
            factory,
        })
    }

    /// Compiles `text`; `source` names it in messages. `continuing`: the answer goes on in a text, so that its
    /// first space counts; else that space is not part of it.
    ///
    /// # Errors
    /// [`Error::Invalid`], naming the place in `text`.
    pub fn compile(
        &self,
        form: Form,
        source: impl AsRef<Path>,
        text: &str,
        continuing: bool,
    ) -> Result<Constraint> {
        let source = source.as_ref().to_path_buf();
        let wrong =
            |expected: &str, found: String| Error::invalid(&source, form.name(), expected, found);
        if text.len() > MAX_SOURCE {
            let expected = format!("at most {MAX_SOURCE} bytes");
            return Err(wrong(&expected, format!("{} bytes", text.len())));
        }
        let followed = |e: String| wrong("one that can be followed", one_line(form, &e));
        let lark = |text| GrammarInit::Serialized(TopLevelGrammar::from_lark(text));
        let grammar = match form {
            Form::Regex => expression(text, self.factory.limits()).map_err(followed)?,
            Form::Grammar if gbnf::is_gbnf(text) => {
                lark(gbnf::to_lark(text).map_err(|e| wrong("GBNF", e))?)
            }
            Form::Grammar => lark(text.to_string()),
            Form::JsonSchema => {
                let schema =
                    bounded::json(text.as_bytes()).map_err(|e| wrong("JSON", e.to_string()))?;
                schema::check(&schema, "schema").map_err(|(place, expected, found)| {
                    wrong(&format!("{expected} at {place}"), found)
                })?;
                short_patterns(&schema).map_err(followed)?;
                let schema = TopLevelGrammar::from_json_schema(with_short_gaps(schema));
                GrammarInit::Serialized(schema)
            }
        };
        let parser = self.factory.create_parser_from_init_default(grammar);
        let parser = parser.map_err(|e| followed(e.to_string()))?;
        let fresh = Matcher::new(Ok(parser));
        if let Some(e) = fresh.get_error() {
            return Err(followed(e));
        }
        let mut constraint = Constraint {
            now: fresh.deep_clone(),
            fresh,
            source,
            form,
            mask: None,
            spaced: self.spaced.clone(),
            strips: !continuing,
            at_start: !continuing,
            spent: Duration::ZERO,
        };
        // A grammar that allows nothing at all is told now.
        constraint.mask()?;
        Ok(constraint)
    }
}

/// What a token prints, as the parser wants it: control pieces by name behind a mark, nothing for pieces that no grammar can ask for.
fn word(tokenizer: &Tokenizer, id: u32) -> Vec<u8> {
    let mark = TokTrie::SPECIAL_TOKEN_MARKER;
    match tokenizer.piece(id) {
        Some(piece) if piece.kind == PieceKind::Control => {
            [&[mark], piece.text.as_bytes()].concat()
        }
        Some(piece) if matches!(piece.kind, PieceKind::Unknown | PieceKind::Unused) => Vec::new(),
        _ => match tokenizer.piece_bytes(id) {
            bytes if bytes.first() == Some(&mark) => Vec::new(),
            bytes => bytes,
        },
    }
}

/// The grammar of one expression. The parser would make a grammar in Lark of it and read that with a lexer that it builds anew each
/// time, which is most of the work.
fn expression(text: &str, limits: &ParserLimits) -> std::result::Result<GrammarInit, String> {
    short_enough(text)?;
    // As the parser does with whatever it compiles.
    let made = panic_utils::catch_unwind(AssertUnwindSafe(|| {
        let mut lexer = LexerSpec::new()?;
        // Nothing is skipped before and behind the answer.
        let class = lexer.setup_lexeme_class(RegexAst::NoMatch)?;
        let regex = RegexAst::Regex(text.to_string());
        let lexeme = lexer.add_greedy_lexeme("regex".into(), regex, false, None, usize::MAX)?;
        let mut grammar = Grammar::new(None);
        let mut symbol = |name, is_start| {
            let props = SymbolProps {
                grammar_id: class,
                is_start,
                ..SymbolProps::default()
            };
            grammar.fresh_symbol_ext(name, props)
        };
        let (start, whole) = (symbol("start", true), symbol("regex", false));
        grammar.make_terminal(whole, lexeme, &lexer)?;
        grammar.add_rule(start, vec![whole])?;
        Ok((grammar, lexer))
    }));
    let (grammar, lexer) = made.map_err(|e| e.to_string())?;
    match lexer.cost() <= limits.initial_lexer_fuel {
        true => Ok(GrammarInit::Internal(grammar, lexer)),
        false => Err("an expression that is too large".to_string()),
    }
}

/// Refuses an expression that would take the parser much memory before it says so itself.
fn short_enough(text: &str) -> std::result::Result<(), String> {
    // What is no expression is the parser's to say.
    let spelled = regex_syntax::parse(text).map_or(0, |hir| spelled(&hir).1);
    if spelled > text.len() as u64 + MAX_SPELLED {
        return Err(format!(
            "{spelled} bytes of letters, once repetitions are written out (at most {MAX_SPELLED} more than the text)"
        ));
    }
    Ok(())
}

/// The same of all expressions of a schema.
fn short_patterns(schema: &Value) -> std::result::Result<(), String> {
    match schema {
        Value::Array(of) => of.iter().try_for_each(short_patterns),
        Value::Object(of) => of.iter().try_for_each(|(key, value)| {
            match (key.as_str(), value) {
                ("pattern", Value::String(text)) => short_enough(text)?,
                ("patternProperties", Value::Object(of)) => {
                    of.keys().try_for_each(|text| short_enough(text))?;
                }
                _ => {}
            }
            short_patterns(value)
        }),
        _ => Ok(()),
    }
}

/// Whether an expression is for one text alone, and how many bytes its letters take when repetitions of such are written out, as
/// the parser does.
fn spelled(hir: &Hir) -> (bool, u64) {
    match hir.kind() {
        HirKind::Literal(letters) => (true, letters.0.len() as u64),
        HirKind::Capture(group) => spelled(&group.sub),
        HirKind::Repetition(times) => match spelled(&times.sub) {
            (true, n) => {
                let all = n.saturating_mul(times.min.max(1).into());
                (times.max == Some(times.min), all)
            }
            open => open,
        },
        HirKind::Concat(parts) => parts.iter().map(spelled).fold((true, 0), both),
        HirKind::Alternation(parts) => (false, parts.iter().map(spelled).fold((true, 0), both).1),
        _ => (false, 0),
    }
}

fn both(a: (bool, u64), b: (bool, u64)) -> (bool, u64) {
    (a.0 && b.0, a.1.saturating_add(b.1))
}

/// The schema, with a bound for the white space between the parts of a value: one space, or a line break and an
/// indentation. Without, a model may write line breaks for ever.
fn with_short_gaps(schema: Value) -> Value {
    let mut schema = match schema {
        Value::Object(map) => map,
        Value::Bool(false) => return json!({ "not": {} }),
        _ => Map::new(),
    };
    schema
        .entry("x-guidance")
        .or_insert_with(|| json!({ "whitespace_pattern": r" |\n {0,32}" }));
    Value::Object(schema)
}

/// The parser's own words in one line: the place, and the fault itself where a quotation comes before it.
fn one_line(form: Form, text: &str) -> String {
    let mut lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
    let first = lines.next().unwrap_or("an unknown fault");
    if first.contains("NoExtension") {
        return "a form that no token can say".to_string();
    }
    let fault = lines.find_map(|line| line.strip_prefix("error: "));
    let line = match fault {
        // The place is one in the grammar that was made of the expression.
        Some(fault) if form == Form::Regex => fault.to_string(),
        Some(fault) => first.replace("(in regex): regex parse error:", fault),
        None => first.to_string(),
    };
    // "at 3(14): " is line 3, column 14.
    let place = regex::Regex::new(r"^(at )?(\d+)\((\d+)\): ").expect("a valid expression");
    let line = place.replace(&line, "line $2, column $3: ");
    match line.char_indices().nth(200) {
        Some((at, _)) => format!("{}…", &line[..at]),
        None => line.into_owned(),
    }
}

/// What is said of an answer that ended too early.
pub const INCOMPLETE: &str = "the answer was cut before it had the form that it must have";

/// Where an answer stands in its grammar.
#[derive(Clone)]
pub struct Constraint {
    /// The file of the grammar, or the option, for messages.
    source: PathBuf,
    form: Form,
    /// Before the first token, to begin again.
    fresh: Matcher,
    now: Matcher,
    /// Tokens that may come next, once it was asked.
    mask: Option<SimpleVob>,
    spaced: Arc<Vec<(u32, Option<u32>)>>,
    /// Whether the first space of the answer is not part of it.
    strips: bool,
    /// Whether that space may still come.
    at_start: bool,
    spent: Duration,
}

impl Constraint {
    /// Begins another answer.
    pub fn begin(&mut self) {
        self.now = self.fresh.deep_clone();
        self.at_start = self.strips;
        self.mask = None;
        self.spent = Duration::ZERO;
    }

    /// The tokens that may come next; the end of the answer is among them only where the grammar allows it.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the grammar is too complex to be followed, or allows what no token can say.
    pub fn mask(&mut self) -> Result<&SimpleVob> {
        if self.mask.is_none() {
            let started = Instant::now();
            let mut mask = self.now.compute_mask_or_eos().map_err(|e| self.fault(e))?;
            if self.at_start {
                let plain = mask.clone();
                for &(spaced, without) in self.spaced.iter() {
                    let allowed = without.is_some_and(|id| plain.is_allowed(id));
                    mask.set(spaced as usize, allowed);
                }
            }
            self.mask = Some(mask);
            self.spent += started.elapsed();
        }
        Ok(self.mask.as_ref().expect("just filled"))
    }

    /// Goes on behind a token that was chosen.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the grammar is too complex to be followed.
    pub fn accept(&mut self, id: u32) -> Result<()> {
        let mut id = id;
        if self.at_start
            && let Ok(at) = self.spaced.binary_search_by_key(&id, |(spaced, _)| *spaced)
        {
            id = self.spaced[at].1.unwrap_or(id);
        }
        self.at_start = false;
        self.mask = None;
        match self.now.is_stopped() {
            // Only the end of the answer was left.
            true => Ok(()),
            false => self.now.consume_token(id).map_err(|e| self.fault(e)),
        }
    }

    /// Time that the masks of this answer took.
    pub fn spent(&self) -> Duration {
        self.spent
    }

    /// The tokens that must come next, whatever the model says; often none.
    pub fn forced(&mut self) -> Vec<u32> {
        match self.now.is_stopped() {
            true => Vec::new(),
            false => self.now.compute_ff_tokens(),
        }
    }

    /// How many of `tokens` the grammar allows from here on.
    pub fn allows(&mut self, tokens: &[u32]) -> usize {
        self.now.validate_tokens(tokens).unwrap_or(0)
    }

    /// Whether the answer may end here.
    pub fn is_complete(&mut self) -> bool {
        self.now.is_stopped() || self.now.is_accepting().unwrap_or(false)
    }

    fn fault(&self, e: impl fmt::Display) -> Error {
        let found = one_line(self.form, &e.to_string());
        Error::invalid(
            &self.source,
            self.form.name(),
            "one that can be followed",
            found,
        )
    }
}

impl fmt::Debug for Constraint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Constraint({})", self.source.display())
    }
}
