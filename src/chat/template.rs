//! A conversation to the ids of a prompt.
//!
//! Three prompt formats, chosen from the vocabulary and the chat template that came with it ([`Template::choose`]):
//!
//! - **V1** (Mixtral 8x7B): `<s> [INST] {system}\n\n{user} [/INST] {assistant}</s> [INST] …`, where `[INST]` is ordinary text.
//!   The system text stands in the first user turn. No tools.
//! - **V3** (Mixtral 8x22B Instruct): `<s>[INST] {user}[/INST] {assistant}</s>…`, where the marks are control pieces.
//!   System text and tools stand at the last user turn; calls and results are JSON between control pieces.
//! - **Jinja**: the file's own template, for everything else (finetunes with ChatML and so on).
//!
//! V1 and V3 follow the rules of mistral-common 1.13 (`MistralTokenizer.v1()`, `.v3()`): a turn's text is encoded on its own, each with
//! SentencePiece's dummy space, and control ids are put between. So nothing that a user typed becomes a control piece.
//! What mistral-common refuses is refused here, with [`Error::Prompt`].

use serde_json::Value;

use super::jinja::JinjaTemplate;
use super::json::{self, Json, NotJson};
use super::message::{Message, Role, ToolCall, join};
use super::tokenizer::Tokenizer;
use super::tools::{self, check_name, check_tool};
use crate::error::{Error, Result};

/// How a model's prompts are made.
#[derive(Debug)]
pub enum Template {
    /// Mixtral 8x7B: `[INST]` is text.
    V1,
    /// Mixtral 8x22B Instruct: `[INST]` is a control piece.
    V3(V3Ids),
    /// The file's own template.
    Jinja(Box<JinjaTemplate>),
}

/// The control pieces of the V3 format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct V3Ids {
    inst: u32,
    end_inst: u32,
    tool_calls: u32,
    tools: u32,
    end_tools: u32,
    results: u32,
    end_results: u32,
}

impl V3Ids {
    /// The ids, if the vocabulary has all of V3's control pieces and none that only later formats have.
    fn find(tok: &Tokenizer) -> Option<V3Ids> {
        if tok.control("[SYSTEM_PROMPT]").is_some() {
            return None; // V7 and later put turns together differently
        }
        Some(V3Ids {
            inst: tok.control("[INST]")?,
            end_inst: tok.control("[/INST]")?,
            tool_calls: tok.control("[TOOL_CALLS]")?,
            tools: tok.control("[AVAILABLE_TOOLS]")?,
            end_tools: tok.control("[/AVAILABLE_TOOLS]")?,
            results: tok.control("[TOOL_RESULTS]")?,
            end_results: tok.control("[/TOOL_RESULTS]")?,
        })
    }
}

impl Template {
    /// The format for a model: V3 if the vocabulary has its control pieces; else V1 if there is no chat template
    /// or it is one of Mistral's (it writes `[INST]`, and not Llama 2's `<<SYS>>`); else the template itself.
    ///
    /// `chat_template` is the file's Jinja text; [`Tokenizer::chat_template`] has it for vocabularies read from
    /// folders. Errors: [`Error::Invalid`] if the template has to be used and is no valid Jinja.
    pub fn choose(tok: &Tokenizer, chat_template: Option<&str>) -> Result<Template> {
        if let Some(ids) = V3Ids::find(tok) {
            return Ok(Template::V3(ids));
        }
        match chat_template {
            None => Ok(Template::V1),
            Some(text)
                if text.contains("[INST]")
                    && !text.contains("<<SYS>>")
                    && tok.control("[INST]").is_none() =>
            {
                Ok(Template::V1)
            }
            Some(text) => Ok(Template::Jinja(Box::new(JinjaTemplate::new(text, tok)?))),
        }
    }

    /// The format's name, for people.
    pub fn name(&self) -> &'static str {
        match self {
            Template::V1 => "Mistral V1",
            Template::V3(_) => "Mistral V3",
            Template::Jinja(_) => "chat template",
        }
    }

    /// Whether tools given to [`Template::encode`] reach the prompt. V1 checks them and leaves them out, as the official
    /// implementation does; a caller should tell the user.
    pub fn shows_tools(&self) -> bool {
        match self {
            Template::V1 => false,
            Template::V3(_) => true,
            Template::Jinja(template) => template.mentions("tools"),
        }
    }

    /// The whole prompt: BOS first, ready for the answer.
    ///
    /// Errors: [`Error::Prompt`] if the conversation breaks the format's rules: roles out of order, nobody to answer to, a tool call
    /// without its id, parameters that are no JSON Schema.
    pub fn encode(
        &self,
        tok: &Tokenizer,
        messages: &[Message],
        tools: Option<&[Value]>,
    ) -> Result<Vec<u32>> {
        match self {
            Template::V1 => {
                validate(messages, tools, false)?;
                encode_v1(tok, messages)
            }
            Template::V3(ids) => {
                validate(messages, tools, true)?;
                encode_v3(tok, ids, messages, tools.unwrap_or(&[]))
            }
            Template::Jinja(template) => template.encode(tok, messages, tools),
        }
    }

    /// Whether an answer that begins with this id is a tool call, and no text for people.
    pub fn begins_call(&self, id: u32) -> bool {
        matches!(self, Template::V3(ids) if ids.tool_calls == id)
    }

    /// The tool calls in the tokens of an answer; none if it is text. `taken`: how many calls the conversation has already.
    ///
    /// Errors: [`Error::Prompt`] if a call is no valid one.
    pub fn calls(&self, tok: &Tokenizer, answer: &[u32], taken: usize) -> Result<Vec<ToolCall>> {
        let text = |ids: &[u32]| String::from_utf8_lossy(&tok.decode(ids)).into_owned();
        match self {
            Template::V3(_) if answer.first().is_some_and(|id| self.begins_call(*id)) => {
                tools::parse_calls(text(&answer[1..]).trim(), taken)
            }
            Template::Jinja(_) if self.shows_tools() => tools::marked_calls(&text(answer), taken),
            _ => Ok(Vec::new()),
        }
    }

    /// The message that a whole answer is; `said` is its text, in which calls are text, too. `taken`: as in [`Template::calls`].
    ///
    /// Errors: as [`Template::calls`].
    pub fn message(
        &self,
        tok: &Tokenizer,
        answer: &[u32],
        said: &str,
        taken: usize,
    ) -> Result<Message> {
        let calls = self.calls(tok, answer, taken)?;
        let text = match self {
            _ if calls.is_empty() => said,
            Template::Jinja(_) => tools::before_calls(said),
            _ => "",
        };
        let mut message = Message::new(Role::Assistant, text);
        message.tool_calls = calls;
        Ok(message)
    }
}

/// What mistral-common checks before it builds a prompt. `ids`: whether calls and results must have them.
fn validate(messages: &[Message], tools: Option<&[Value]>, ids: bool) -> Result<()> {
    check_order(messages)?;
    check_results(messages)?;
    for (i, message) in messages.iter().enumerate() {
        check_message(message, ids)?;
        if message.prefix && message.role == Role::Assistant && i + 1 != messages.len() {
            return Err(Error::prompt(
                "an assistant message with \"prefix\": true",
                "the last message",
                format!("message {}", i + 1),
            ));
        }
    }
    tools.unwrap_or(&[]).iter().try_for_each(check_tool)
}

/// Who may speak first, last and after whom.
fn check_order(messages: &[Message]) -> Result<()> {
    let first = messages
        .first()
        .ok_or_else(|| Error::prompt("the conversation", "at least one message", "none"))?;
    if messages.len() == 1 && !matches!(first.role, Role::User | Role::System) {
        return Err(Error::prompt(
            "the only message",
            "a user or system message",
            role_of(first),
        ));
    }
    let last = &messages[messages.len() - 1];
    if last.role == Role::Assistant && !last.prefix {
        return Err(Error::prompt(
            "the last message",
            "a user or tool message, or an assistant message with \"prefix\": true",
            role_of(last),
        ));
    }
    for pair in messages.windows(2) {
        use Role::*;
        let expected = match pair[0].role {
            System => [User, Assistant, System],
            User => [Assistant, System, User],
            Assistant => [Assistant, User, Tool],
            Tool => [Assistant, Tool, User],
        };
        if !expected.contains(&pair[1].role) {
            return Err(Error::prompt(
                format!("the message after a {} message", pair[0].role.name()),
                expected.map(Role::name).join(", "),
                role_of(&pair[1]),
            ));
        }
    }
    Ok(())
}

/// Before each further assistant message all calls must have their results. The official count begins after
/// the first message and is not checked at the end; the same conversations pass here.
fn check_results(messages: &[Message]) -> Result<()> {
    let mut open = 0i64;
    for message in &messages[1..] {
        match message.role {
            Role::Tool => open -= 1,
            Role::Assistant if open != 0 => {
                let found = if open > 0 {
                    "fewer results"
                } else {
                    "more results"
                };
                return Err(Error::prompt(
                    "tool calls and results",
                    "one result for each call",
                    found,
                ));
            }
            Role::Assistant => open = message.tool_calls.len() as i64,
            _ => {}
        }
    }
    Ok(())
}

/// What a single message may say.
fn check_message(message: &Message, ids: bool) -> Result<()> {
    match message.role {
        Role::Assistant => {
            if message.content.is_empty() == message.tool_calls.is_empty() {
                let found = if message.content.is_empty() {
                    "neither"
                } else {
                    "both"
                };
                return Err(Error::prompt(
                    "an assistant message",
                    "either text or tool calls",
                    found,
                ));
            }
            for call in &message.tool_calls {
                if ids {
                    check_id(Some(&call.id).filter(|id| *id != "null"))?;
                }
                check_name(&call.name)?;
            }
        }
        Role::Tool => {
            if let Some(name) = &message.name {
                check_name(name)?;
            }
            if ids {
                check_id(message.tool_call_id.as_ref())?;
            }
        }
        Role::System | Role::User => {}
    }
    Ok(())
}

fn role_of(message: &Message) -> String {
    let article = if message.role == Role::Assistant {
        "an"
    } else {
        "a"
    };
    format!("{article} {} message", message.role.name())
}

fn check_id(id: Option<&String>) -> Result<()> {
    match id {
        Some(id) if id.len() == 9 && id.bytes().all(|b| b.is_ascii_alphanumeric()) => Ok(()),
        id => Err(Error::prompt(
            "a tool call's id",
            "9 letters or digits (a-z, A-Z, 0-9)",
            id.map_or("none".into(), |id| format!("{id:?}")),
        )),
    }
}

/// A turn: neighbours with one role are one, system messages have gone to the system text.
enum Turn<'a> {
    User(String),
    Assistant {
        text: String,
        calls: Vec<&'a ToolCall>,
        prefix: bool,
    },
    Tool(&'a Message),
}

/// The system text (`None` or not empty) and the turns; the first turn is always the user's.
fn turns(messages: &[Message]) -> (Option<String>, Vec<Turn<'_>>) {
    let texts = |group: &[Message]| {
        join(
            group
                .iter()
                .map(|m| m.content.as_str())
                .collect::<Vec<_>>()
                .into_iter(),
        )
    };
    let system = join(
        messages
            .iter()
            .filter(|m| m.role == Role::System)
            .map(|m| m.content.as_str()),
    );
    let mut turns = Vec::new();
    // System messages part the groups although they leave no turn.
    for group in messages.chunk_by(|a, b| a.role == b.role) {
        match group[0].role {
            Role::System => {}
            Role::User => turns.push(Turn::User(texts(group))),
            Role::Assistant => turns.push(Turn::Assistant {
                text: texts(group),
                calls: group.iter().flat_map(|m| &m.tool_calls).collect(),
                prefix: group.iter().any(|m| m.prefix),
            }),
            Role::Tool => turns.extend(group.iter().map(Turn::Tool)),
        }
    }
    if !matches!(turns.first(), Some(Turn::User(_))) {
        turns.insert(0, Turn::User(String::new()));
    }
    (Some(system).filter(|s| !s.is_empty()), turns)
}

fn with_system(system: Option<&String>, text: &str) -> String {
    match system {
        Some(system) => format!("{system}\n\n{text}"),
        None => text.to_string(),
    }
}

/// The end of a turn. A vocabulary without it cannot hold a conversation.
fn push_eos(tok: &Tokenizer, out: &mut Vec<u32>) -> Result<()> {
    let eos = tok.eos().ok_or_else(|| {
        Error::missing(
            tok.source(),
            "the end-of-sequence token",
            "a conversation needs it",
        )
    })?;
    out.push(eos);
    Ok(())
}

fn encode_v1(tok: &Tokenizer, messages: &[Message]) -> Result<Vec<u32>> {
    let no_tools = |found: &str| {
        Err(Error::prompt(
            "this model's prompt format has no tools",
            "text only",
            found,
        ))
    };
    let (mut system, turns) = turns(messages);
    let mut out: Vec<u32> = tok.bos().into_iter().collect();
    for turn in turns {
        match turn {
            Turn::User(text) => {
                let text = with_system(system.take().as_ref(), &text);
                out.extend(tok.encode(&format!("[INST] {text} [/INST]")));
            }
            Turn::Assistant { calls, .. } if !calls.is_empty() => return no_tools("a tool call"),
            Turn::Assistant { text, prefix, .. } => {
                out.extend(tok.encode(&text));
                if !prefix {
                    push_eos(tok, &mut out)?;
                }
            }
            Turn::Tool(_) => return no_tools("a tool message"),
        }
    }
    Ok(out)
}

fn encode_v3(
    tok: &Tokenizer,
    ids: &V3Ids,
    messages: &[Message],
    tools: &[Value],
) -> Result<Vec<u32>> {
    let (system, turns) = turns(messages);
    let last_user = turns.iter().rposition(|turn| matches!(turn, Turn::User(_)));
    let mut out: Vec<u32> = tok.bos().into_iter().collect();
    for (i, turn) in turns.into_iter().enumerate() {
        match turn {
            Turn::User(text) => {
                let last = Some(i) == last_user;
                if last && !tools.is_empty() {
                    out.push(ids.tools);
                    out.extend(
                        tok.encode(&Json::List(tools.iter().map(tool_json).collect()).dump()),
                    );
                    out.push(ids.end_tools);
                }
                out.push(ids.inst);
                out.extend(tok.encode(&with_system(system.as_ref().filter(|_| last), &text)));
                out.push(ids.end_inst);
            }
            Turn::Assistant {
                text,
                calls,
                prefix,
            } => {
                if calls.is_empty() {
                    // Spaces at the end would be tokenized differently from the space that the next token brings.
                    out.extend(tok.encode(text.trim_end_matches(' ')));
                } else if text.is_empty() {
                    let calls = calls.into_iter().map(call_json).collect::<Result<_>>()?;
                    out.push(ids.tool_calls);
                    out.extend(tok.encode(&Json::List(calls).dump()));
                } else {
                    return Err(Error::prompt(
                        "an assistant turn",
                        "either text or tool calls",
                        "both",
                    ));
                }
                if !prefix {
                    push_eos(tok, &mut out)?;
                }
            }
            Turn::Tool(message) => {
                let result = Json::Object(vec![
                    (
                        "content".into(),
                        loads(&message.content, "a tool's result")?,
                    ),
                    (
                        "call_id".into(),
                        Json::Text(message.tool_call_id.clone().unwrap_or_default()),
                    ),
                ]);
                out.push(ids.results);
                out.extend(tok.encode(&result.dump()));
                out.push(ids.end_results);
            }
        }
    }
    Ok(out)
}

/// JSON text as the value it says, other text as itself, nothing as an empty object.
fn loads(text: &str, what: &str) -> Result<Json> {
    if text.is_empty() {
        return Ok(Json::Object(Vec::new()));
    }
    match json::parse(text) {
        Ok(value) => Ok(value),
        Err(NotJson::Text) => Ok(Json::Text(text.to_string())),
        Err(NotJson::Refused(found)) => {
            Err(Error::prompt(what, "JSON that can be written again", found))
        }
    }
}

fn call_json(call: &ToolCall) -> Result<Json> {
    Ok(Json::Object(vec![
        ("name".into(), Json::Text(call.name.clone())),
        (
            "arguments".into(),
            loads(&call.arguments, "a tool call's arguments")?,
        ),
        ("id".into(), Json::Text(call.id.clone())),
    ]))
}

/// A checked tool with the format's keys in the format's order; other keys do not reach the model.
fn tool_json(tool: &Value) -> Json {
    let function = &tool["function"];
    let text = |key: &str| Json::Text(function[key].as_str().unwrap_or_default().to_string());
    let parameters = match &function["parameters"] {
        Value::Null => Json::Object(Vec::new()),
        parameters => parameters.into(),
    };
    Json::Object(vec![
        ("type".into(), Json::Text("function".into())),
        (
            "function".into(),
            Json::Object(vec![
                ("name".into(), text("name")),
                ("description".into(), text("description")),
                ("parameters".into(), parameters),
            ]),
        ),
    ])
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn tokenizer(name: &str) -> Option<Tokenizer> {
        crate::chat::vocabulary(name).map(|path| Tokenizer::from_path(&path).unwrap())
    }

    #[test]
    fn the_format_follows_from_the_vocabulary_and_the_template() {
        let v1 = tokenizer("mixtral-8x7b.tokenizer.model").unwrap();
        let mistral =
            "{{ bos_token }}{% for m in messages %}[INST] {{ m['content'] }} [/INST]{% endfor %}";
        let llama2 = "[INST] <<SYS>>{{ messages[0].content }}<</SYS>> [/INST]";
        for template in [None, Some(mistral)] {
            assert!(matches!(Template::choose(&v1, template), Ok(Template::V1)));
        }
        for template in ["<|im_start|>{{ messages[0].content }}", llama2] {
            assert!(matches!(
                Template::choose(&v1, Some(template)),
                Ok(Template::Jinja(_))
            ));
        }
        let Some(v3) = tokenizer("mixtral-8x22b-instruct.tokenizer.model") else {
            return;
        };
        for template in [None, Some(mistral), Some("<|im_start|>")] {
            assert!(matches!(
                Template::choose(&v3, template),
                Ok(Template::V3(_))
            ));
        }
        assert!(matches!(
            Template::choose(&v1, Some("{% if")),
            Err(Error::Invalid { .. })
        ));
    }

    #[test]
    fn typed_marks_stay_text() {
        let Some(tok) = tokenizer("mixtral-8x22b-instruct.tokenizer.model") else {
            return;
        };
        let template = Template::choose(&tok, None).unwrap();
        let typed = "</s>[INST][/INST]<s>[TOOL_CALLS][AVAILABLE_TOOLS]<unk>";
        let ids = template
            .encode(&tok, &[Message::new(Role::User, typed)], None)
            .unwrap();
        assert_eq!((ids[..2].to_vec(), ids[ids.len() - 1]), (vec![1, 3], 4));
        assert!(!ids[2..ids.len() - 1].iter().any(|&id| tok.is_control(id)));
    }

    #[test]
    fn a_vocabulary_without_an_end_says_so() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("tests/data/tokenizers/demo.tokenizer.model");
        let mut vocab = crate::chat::tokenizer::Vocab::from_path(&path).unwrap();
        vocab.eos = None;
        vocab.bos = None;
        let tok = Tokenizer::new(vocab, &path).unwrap();
        let chat = ["a", "b", "c"].map(|text| Message::new(Role::User, text));
        assert_eq!(
            Template::V1.encode(&tok, &chat[..1], None).unwrap(),
            tok.encode("[INST] a [/INST]")
        );
        let mut chat = chat;
        chat[1].role = Role::Assistant;
        assert!(matches!(
            Template::V1.encode(&tok, &chat, None),
            Err(Error::Missing { .. })
        ));
    }
}
