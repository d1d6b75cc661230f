//! Conversations on disk: a text that anybody can read, and beside it the KV cache.
//!
//! `NAME` is JSON, one document a line: a head, the messages in OpenAI's shape (the system text first), an end with a checksum of all
//! lines before it. It is small and replaced as a whole after each turn: written beside, flushed, renamed. `NAME.kv` is
//! the KV cache ([`crate::moe::kv_file`]), of which only what is new is written; its lock is the session's. The two
//! need not agree: the text says what was said, and the cache only saves reading what of that it holds.

use super::conversation::Conversation;
use super::message::{Message, Role};
use super::session::Session;
use crate::bounded;
use crate::disk::{self, WholeFile};
use crate::error::{Error, Result};
use crate::gguf::hex;
use crate::moe::kv_file::KvFile;
use serde_json::{Value, json};
use std::io::Write;
use std::path::{Path, PathBuf};

/// What the first line of a session begins with.
const START: &str = "{\"octet\":\"session\"";
/// And its last.
const END: &str = "{\"octet\":\"end\"";
const VERSION: u64 = 1;

/// The longest text of a conversation that is read, in bytes: hundreds of contexts.
const MAX_TEXT: u64 = 64 << 20;

/// What sessions need to know of a model.
#[derive(Clone, Debug)]
pub struct ModelId {
    /// The file's name, for people.
    pub name: String,
    /// [`crate::gguf::Gguf::identity`].
    pub hash: [u8; 32],
}

/// An open session: the files to which a conversation is saved.
pub struct Saved {
    path: PathBuf,
    kv: KvFile,
    model: ModelId,
    /// The disk had no room for the KV cache.
    no_room: bool,
}

/// What a session held.
#[derive(Debug, Default)]
pub struct Resumed {
    /// What was said.
    pub conversation: Conversation,
    /// Whether there was a session; if not, it is new.
    pub found: bool,
    /// Whether its text was damaged. The file has another name then, and the conversation no file until it is saved.
    pub damaged: bool,
    /// What could not be used, for the user.
    pub notes: Vec<String>,
}

/// Where the KV cache of a session lies.
pub fn kv_path(path: &Path) -> PathBuf {
    disk::beside(path, ".kv")
}

impl Saved {
    /// Opens the session at `path`, or makes one, for this process alone. What it holds is given back; its KV cache is in `session` then,
    /// which is empty if there is none. A damaged text is kept beside the session under another name.
    ///
    /// # Errors
    /// If the files cannot be opened, are no session's, or another process uses them; `session` is as before.
    pub fn open(
        path: &Path,
        session: &mut Session<'_>,
        model: &ModelId,
    ) -> Result<(Saved, Resumed)> {
        // Before anything is made or locked: is it a session at all?
        read(path)?;
        let mut resumed = Resumed::default();
        let mut kv = match KvFile::open(&kv_path(path), session.cache().0, &model.hash) {
            // Beside a session's text this was its cache, or takes its place. The text goes on without.
            Err(Error::Invalid { .. }) if path.exists() => {
                let file = kv_path(path);
                let copy = keep_copy(&file)?;
                resumed.notes.push(format!(
                    "{}: it is no KV cache of octet's and is kept as {}; the cache is computed again",
                    file.display(),
                    copy.display()
                ));
                KvFile::open(&file, session.cache().0, &model.hash)?
            }
            opened => opened?,
        };
        // Again, now that nobody else can change it.
        let text = read(path)?;
        let mut refused = None;
        session.refill(|cache| {
            let loaded = kv.load(cache)?;
            refused = loaded.refused;
            Ok(loaded.tokens)
        })?;
        if let Some(why) = refused {
            let file = kv_path(path);
            let note = format!("{}: {why}; it is computed again", file.display());
            resumed.notes.push(note);
        }
        if let Some(text) = text {
            resumed.found = true;
            if let Some(damage) = text.damage {
                resumed.damaged = true;
                let copy = keep_copy(path)?;
                let note = format!(
                    "{}: {damage}; the file is kept as {}",
                    path.display(),
                    copy.display()
                );
                resumed.notes.push(note);
            } else if text.model != hex(&model.hash) {
                let note = format!(
                    "{}: it was made with another model, {}",
                    path.display(),
                    text.model_name
                );
                resumed.notes.push(note);
            }
            resumed.conversation = text.conversation;
        }
        let saved = Saved {
            path: path.to_path_buf(),
            kv,
            model: model.clone(),
            no_room: false,
        };
        Ok((saved, resumed))
    }

    /// A new session at `path`, where none is.
    ///
    /// # Errors
    /// As [`Saved::open`].
    pub fn create(path: &Path, session: &Session<'_>, model: &ModelId) -> Result<Saved> {
        Ok(Saved {
            path: path.to_path_buf(),
            kv: KvFile::open(&kv_path(path), session.cache().0, &model.hash)?,
            model: model.clone(),
            no_room: false,
        })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Makes the files hold the conversation and the session's KV cache. Where the disk has no room for both, the cache goes:
    /// nothing is lost with it but time. That is said once; it is not tried again.
    ///
    /// # Errors
    /// If a file cannot be written. The text is written first, and is whole in any case.
    pub fn save(
        &mut self,
        conversation: &Conversation,
        session: &Session<'_>,
    ) -> Result<Option<Error>> {
        let text = write(conversation, &self.model);
        let mut dropped = None;
        match self.put(&text) {
            Err(e) if is_full(&e) && !self.no_room => {
                self.drop_cache()?;
                self.put(&text)?;
                dropped = Some(e);
            }
            put => put?,
        }
        let (kv, tokens) = session.cache();
        if !self.no_room
            && let Err(e) = self.kv.save(kv, tokens)
        {
            if !is_full(&e) {
                return Err(e);
            }
            self.drop_cache()?;
            dropped = Some(e);
        }
        Ok(dropped)
    }

    fn put(&self, text: &[u8]) -> Result<()> {
        let mut file = WholeFile::create_private(&self.path)?;
        let written = file.write_all(text);
        written.map_err(Error::io(&self.path, "write"))?;
        file.finish()
    }

    fn drop_cache(&mut self) -> Result<()> {
        self.no_room = true;
        self.kv.clear()
    }
}

/// Whether a disk or a quota is full.
fn is_full(e: &Error) -> bool {
    use std::io::ErrorKind::{FileTooLarge, QuotaExceeded, StorageFull};
    matches!(e, Error::Io { source, .. } if matches!(source.kind(), StorageFull | QuotaExceeded | FileTooLarge))
}

/// The text of a session's file.
fn write(conversation: &Conversation, model: &ModelId) -> Vec<u8> {
    let head = json!({
        "octet": "session",
        "version": VERSION,
        "model": model.name,
        "identity": hex(&model.hash),
        "left_out": conversation.from,
    });
    let mut text = format!("{head}\n");
    let system = conversation
        .system
        .iter()
        .map(|s| Message::new(Role::System, s));
    for message in system.chain(conversation.messages.iter().cloned()) {
        text += &format!("{}\n", message.to_json());
    }
    let sum = format!("{:016x}", disk::checksum(0, text.as_bytes()));
    let end = json!({"octet": "end", "sum": sum});
    text += &format!("{end}\n");
    text.into_bytes()
}

/// A session's file as it was read.
struct Text {
    conversation: Conversation,
    model_name: String,
    model: String,
    /// What is wrong with it: the conversation is what could be read.
    damage: Option<String>,
}

/// Reads a session's file; `None` if there is none.
fn read(path: &Path) -> Result<Option<Text>> {
    if !path.exists() {
        return Ok(None);
    }
    let bytes = disk::read(path, MAX_TEXT)?;
    let (start, last) = (bytes.starts_with(START.as_bytes()), last_line(&bytes));
    // A damaged line at either end does not make it a foreign file.
    if !start && !last.starts_with(END.as_bytes()) {
        return Err(Error::invalid(
            path,
            "the file",
            "a session of octet's",
            "something else",
        ));
    }
    let body = &bytes[..bytes.len() - last.len()];
    let end = bounded::json(last).unwrap_or_default();
    let sum = format!("{:016x}", disk::checksum(0, body));
    let whole = end["sum"] == sum.as_str();
    let mut lines = body.split(|b| *b == b'\n').filter(|line| !line.is_empty());
    let head: Value = lines
        .next()
        .and_then(|line| bounded::json(line).ok())
        .unwrap_or_default();
    if whole && head["version"] != VERSION {
        let what = "the session's version";
        return Err(Error::unsupported(path, what, VERSION, &head["version"]));
    }
    let mut conversation = Conversation::default();
    let mut lost = 0;
    for line in lines {
        let message = bounded::json(line).ok();
        match message.as_ref().and_then(|m| Message::from_json(m).ok()) {
            Some(m) if m.role == Role::System => conversation.system = Some(m.content),
            Some(m) => conversation.messages.push(m),
            None => lost += 1,
        }
    }
    let from = head["left_out"].as_u64().unwrap_or(0);
    conversation.leave_out(usize::try_from(from).unwrap_or(usize::MAX));
    let text = |key: &str| head[key].as_str().unwrap_or_default().to_string();
    let damage = (!whole || lost > 0).then(|| {
        let found = conversation.messages.len();
        format!("the session is damaged; {found} messages could be read")
    });
    Ok(Some(Text {
        conversation,
        model_name: text("model"),
        model: text("identity"),
        damage,
    }))
}

/// The last line with its end.
fn last_line(bytes: &[u8]) -> &[u8] {
    let text = bytes.strip_suffix(b"\n").unwrap_or(bytes);
    let start = text
        .iter()
        .rposition(|b| *b == b'\n')
        .map_or(0, |at| at + 1);
    &bytes[start..]
}

/// Gives the file a name that is free; says which.
fn keep_copy(path: &Path) -> Result<PathBuf> {
    let free = (1..)
        .map(|i| disk::beside(path, &format!(".damaged{i}")))
        .find(|copy| !copy.exists())
        .expect("some number is free");
    std::fs::rename(path, &free).map_err(Error::io(path, "rename"))?;
    Ok(free)
}

/// What sessions are called that have no path of their own.
const EXTENSION: &str = "chat";

/// The folder of sessions that have names.
#[derive(Clone, Debug)]
pub struct Shelf(pub PathBuf);

/// A session on the shelf.
#[derive(Clone, Debug)]
pub struct Entry {
    /// Its name.
    pub name: String,
    /// When it was saved.
    pub saved: std::time::SystemTime,
    /// Bytes of its files.
    pub bytes: u64,
    /// Its turns, and what it began with; `None`: it cannot be read.
    pub content: Option<(usize, String)>,
}

impl Shelf {
    /// Where the session `name` lies: on the shelf, or at a path of its own if the name is one.
    ///
    /// # Errors
    /// [`Error::Usage`] if it is neither.
    pub fn path(&self, name: &str) -> Result<PathBuf> {
        if name.contains(['/', std::path::MAIN_SEPARATOR]) {
            return Ok(name.into());
        }
        if name.is_empty() || name.starts_with(['.', '-']) || name.contains(char::is_control) {
            return Err(Error::Usage(format!(
                "{name:?}: expected a name for the session"
            )));
        }
        Ok(self.0.join(format!("{name}.{EXTENSION}")))
    }

    /// The name of the session at `path`; the path itself if it is not on the shelf.
    pub fn name(&self, path: &Path) -> String {
        let named = path.extension().is_some_and(|e| e == EXTENSION);
        match path
            .file_stem()
            .filter(|_| named && path.parent() == Some(&self.0))
        {
            Some(stem) => stem.to_string_lossy().into_owned(),
            None => path.display().to_string(),
        }
    }

    /// A place for a session that nobody named.
    pub fn free(&self) -> PathBuf {
        let path = |i: u64| self.0.join(format!("chat-{i}.{EXTENSION}"));
        let mut paths = (1..).map(path);
        let free = paths.find(|path| !path.exists());
        free.expect("some number is free")
    }

    /// The names of all sessions on the shelf, in order.
    pub fn names(&self) -> Vec<String> {
        let Ok(folder) = std::fs::read_dir(&self.0) else {
            return Vec::new();
        };
        let paths = folder.flatten().map(|entry| entry.path());
        let sessions = paths.filter(|path| path.extension().is_some_and(|e| e == EXTENSION));
        let mut names: Vec<_> = sessions.map(|path| self.name(&path)).collect();
        names.sort();
        names
    }

    /// All sessions on the shelf, the last one that was saved first.
    pub fn entries(&self) -> Vec<Entry> {
        let entry = |name: String| {
            let path = self.path(&name).ok()?;
            let about = std::fs::metadata(&path).ok()?;
            let kv = std::fs::metadata(kv_path(&path)).map_or(0, |about| about.len());
            let text = read(&path).ok().flatten();
            let content = text.map(|text| {
                let c = text.conversation;
                let first = c.messages.first().map(|m| m.content.clone());
                (c.len(), first.unwrap_or_default())
            });
            Some(Entry {
                name,
                saved: about.modified().ok()?,
                bytes: about.len() + kv,
                content,
            })
        };
        let mut entries: Vec<_> = self.names().into_iter().filter_map(entry).collect();
        entries.sort_by_key(|entry| std::cmp::Reverse(entry.saved));
        entries
    }
}
