//! Requests in JSON, in OpenAI's form or our own, and answers in OpenAI's form.

use super::constraint::Form;
use super::message::{Message, Role, brief};
use super::sampler::{SamplerOptions, settings};
use super::session::{Answer, Finish, Limits};
use super::template::Template;
use super::tokenizer::Tokenizer;
use super::tools::check_tool;
use crate::error::{Error, Result};
use serde_json::{Map, Value, json};

/// What a request that does not say gets.
#[derive(Clone, Debug)]
pub struct Defaults {
    /// System text for a `prompt`.
    pub system: Option<String>,
    /// Whether a `prompt` is continued as it is, without the model's chat format.
    pub raw: bool,
    /// Most tokens of an answer; `None`: as many as the context holds.
    pub max_tokens: Option<usize>,
    /// Texts before which an answer ends.
    pub stops: Vec<String>,
    /// Whether an answer goes on where the model would end it.
    pub ignore_ends: bool,
    /// The form that an answer must have, and its text.
    pub form: Option<(Form, String)>,
    /// How tokens are chosen.
    pub sampling: SamplerOptions,
}

/// What an answer is, to OpenAI's clients.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Object {
    /// `chat.completion`: a message.
    Chat,
    /// `text_completion`: the text that follows.
    Text,
}

/// A request that can be run.
#[derive(Clone, Debug)]
pub struct Request {
    /// What the answer looks like.
    pub object: Object,
    /// The whole prompt.
    pub prompt: Vec<u32>,
    /// How tokens are chosen.
    pub sampling: SamplerOptions,
    /// When the answer ends, and what is recorded.
    pub limits: Limits,
    /// Texts before which it ends, too.
    pub stops: Vec<String>,
    /// The form that it must have, and its text.
    pub form: Option<(Form, String)>,
    /// How many of the likeliest tokens the answer tells, if it tells probabilities.
    pub logprobs: Option<usize>,
    /// If the answer may call tools: how many calls the messages have already.
    pub calls: Option<usize>,
}

/// Fields that OpenAI's clients send and that change nothing here.
const IGNORED: &[&str] = &[
    "model",
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
];

/// OpenAI's most; what is recorded takes memory.
const MAX_LOGPROBS: usize = 20;

/// A line of a batch: who asks, and what.
pub struct Line<'v> {
    /// The line's own name for itself.
    pub custom_id: Option<&'v str>,
    /// What is asked: a request, or what is wrong with the line.
    pub body: Result<Body<'v>>,
}

/// The fields of a request.
pub struct Body<'v> {
    fields: Vec<(&'v str, &'v Value)>,
    /// What OpenAI's URL asks for; `None`: the request is in our own form.
    object: Option<Object>,
}

impl<'v> Line<'v> {
    /// Takes a line apart: `{"custom_id", "method", "url", "body"}`, or a request with or without `custom_id`.
    pub fn new(value: &'v Value) -> Line<'v> {
        let Value::Object(line) = value else {
            return Line {
                custom_id: None,
                body: Err(Error::request("the line", "an object", brief(value))),
            };
        };
        let custom_id = line.get("custom_id").filter(|id| !id.is_null());
        let body = match custom_id {
            Some(id) if !id.is_string() => Err(Error::request("custom_id", "a string", brief(id))),
            _ if line.contains_key("body") => openai(line),
            _ => Ok(Body {
                fields: fields(line)
                    .filter(|(key, _)| *key != "custom_id")
                    .collect(),
                object: None,
            }),
        };
        Line {
            custom_id: custom_id.and_then(Value::as_str),
            body,
        }
    }
}

/// Fields that say something; null is as good as nothing.
fn fields(object: &Map<String, Value>) -> impl Iterator<Item = (&str, &Value)> {
    object
        .iter()
        .map(|(key, value)| (key.as_str(), value))
        .filter(|(_, value)| !value.is_null())
}

/// A line of OpenAI's batch form.
fn openai(line: &Map<String, Value>) -> Result<Body<'_>> {
    const KEYS: [&str; 4] = ["custom_id", "method", "url", "body"];
    if let Some((key, _)) = fields(line).find(|(key, _)| !KEYS.contains(key)) {
        return Err(Error::request(
            "a field",
            KEYS.join(", "),
            brief(&key.into()),
        ));
    }
    let object = match line.get("url").and_then(Value::as_str) {
        Some("/v1/chat/completions") => Object::Chat,
        Some("/v1/completions") => Object::Text,
        _ => {
            let found = brief(line.get("url").unwrap_or(&Value::Null));
            let expected = "/v1/chat/completions or /v1/completions";
            return Err(Error::request("url", expected, found));
        }
    };
    match line.get("method") {
        None | Some(Value::Null) => {}
        Some(method) if method == "POST" => {}
        Some(method) => return Err(Error::request("method", "POST", brief(method))),
    }
    match &line["body"] {
        Value::Object(body) => Ok(Body {
            fields: fields(body).collect(),
            object: Some(object),
        }),
        other => Err(Error::request("body", "an object", brief(other))),
    }
}

/// What the fields of a body said, before the prompt is made.
struct Said<'v> {
    prompt: Option<&'v Value>,
    messages: Option<&'v Value>,
    logprobs: Option<usize>,
    top_logprobs: Option<usize>,
    /// Tools that may be called, in OpenAI's shape.
    tools: &'v [Value],
    /// Whether none of them may be, after all.
    no_calls: bool,
    /// The defaults, and what the fields changed.
    rest: Defaults,
}

impl Request {
    /// The request of a line.
    ///
    /// # Errors
    /// [`Error::Request`] for a field that is not known or cannot be what it is, [`Error::Prompt`] if the messages
    /// make no prompt.
    pub fn new(
        body: &Body<'_>,
        defaults: &Defaults,
        tokenizer: &Tokenizer,
        template: &Template,
        n_vocab: usize,
    ) -> Result<Request> {
        let mut said = Said {
            prompt: None,
            messages: None,
            logprobs: None,
            top_logprobs: None,
            tools: &[],
            no_calls: false,
            rest: defaults.clone(),
        };
        for (key, value) in &body.fields {
            said.field(key, value, body.object)?;
        }
        said.rest.sampling.check(n_vocab)?;
        let logprobs = match (said.logprobs, said.top_logprobs) {
            (None, Some(k)) if k > 0 => {
                return Err(Error::request("top_logprobs", "logprobs, too", k));
            }
            (logprobs, top) => logprobs.map(|k| top.unwrap_or(k)),
        };
        if said.no_calls {
            said.tools = &[];
        }
        if !said.tools.is_empty() && said.rest.form.is_some() {
            let expected = "none beside an answer that must have a form";
            return Err(Error::request("tools", expected, said.tools.len()));
        }
        let Prompt { object, ids, calls } = said.prompt(body.object, tokenizer, template)?;
        let mut rest = said.rest;
        let mut limits = Limits {
            max_tokens: rest.max_tokens,
            stop: tokenizer.stop_ids(),
            logprobs: logprobs.map_or(0, |k| k.max(1)),
        };
        if rest.ignore_ends && rest.form.is_some() {
            let expected = "false for an answer that must have a form";
            return Err(Error::request("ignore_eos", expected, true));
        }
        if rest.ignore_ends {
            limits.ignore_ends(&mut rest.sampling);
        }
        Ok(Request {
            object,
            prompt: ids,
            sampling: rest.sampling,
            limits,
            stops: rest.stops,
            form: rest.form,
            logprobs,
            calls,
        })
    }
}

/// The tokens of a prompt, and what follows them.
struct Prompt {
    object: Object,
    ids: Vec<u32>,
    /// [`Request::calls`].
    calls: Option<usize>,
}

/// The form that OpenAI's `response_format` asks for.
fn response_format(value: &Value) -> Result<Option<(Form, String)>> {
    let schema = match value["type"].as_str() {
        Some("text") => return Ok(None),
        Some("json_object") => json!({"type": "object"}),
        Some("json_schema") => value["json_schema"]["schema"].clone(),
        _ => {
            let expected = "the type text, json_object or json_schema";
            return Err(Error::request("response_format", expected, brief(value)));
        }
    };
    if schema.is_null() {
        return Err(Error::request(
            "response_format",
            "a schema in json_schema",
            "none",
        ));
    }
    Ok(Some((Form::JsonSchema, schema.to_string())))
}

impl<'v> Said<'v> {
    /// Takes one field in. `openai`: OpenAI's requests do not have all of our fields.
    fn field(&mut self, key: &str, value: &'v Value, openai: Option<Object>) -> Result<()> {
        let bad = |expected: &str| Err(Error::request(key, expected, brief(value)));
        let number = |most: u64| value.as_u64().filter(|n| *n <= most);
        match key {
            "prompt" => self.prompt = Some(value),
            "messages" => self.messages = Some(value),
            "system" if openai.is_none() => match value.as_str() {
                Some(text) => self.rest.system = Some(text.to_string()),
                None => return bad("a string"),
            },
            "raw" if openai.is_none() => match value.as_bool() {
                Some(raw) => self.rest.raw = raw,
                None => return bad("true or false"),
            },
            "ignore_eos" => match value.as_bool() {
                Some(ignore) => self.rest.ignore_ends = ignore,
                None => return bad("true or false"),
            },
            "stop" => {
                let list = value
                    .as_array()
                    .map_or(std::slice::from_ref(value), Vec::as_slice);
                let text = |v: &Value| Some(v.as_str().filter(|t| !t.is_empty())?.to_string());
                match list.iter().map(text).collect() {
                    Some(stops) => self.rest.stops = stops,
                    None => return bad("a text, or a list of texts"),
                }
            }
            "predict" | "n_predict" | "max_tokens" | "max_completion_tokens" => {
                self.rest.max_tokens = match number(u64::from(u32::MAX)) {
                    Some(n) => Some(n as usize),
                    None if value.as_i64() == Some(-1) => None,
                    None => return bad("a number of tokens"),
                };
            }
            "logprobs" | "top_logprobs" => {
                let k = match value {
                    Value::Bool(tell) => tell.then_some(0),
                    _ => match number(MAX_LOGPROBS as u64) {
                        Some(k) => Some(k as usize),
                        None => return bad(&format!("true, false or 0 to {MAX_LOGPROBS}")),
                    },
                };
                match key {
                    "logprobs" => self.logprobs = k,
                    _ => self.top_logprobs = k,
                }
            }
            "tools" => match value.as_array() {
                Some(tools) => {
                    tools.iter().try_for_each(check_tool)?;
                    self.tools = tools;
                }
                None => return bad("a list of tools"),
            },
            "tool_choice" => match value.as_str() {
                Some("auto") => {}
                Some("none") => self.no_calls = true,
                _ => return bad("auto or none"),
            },
            "parallel_tool_calls" if value != true => return bad("true"),
            "parallel_tool_calls" => {}
            "response_format" => self.rest.form = response_format(value)?,
            "json_schema" if openai.is_none() => {
                let text = value
                    .as_str()
                    .map_or_else(|| value.to_string(), String::from);
                self.rest.form = Some((Form::JsonSchema, text));
            }
            "grammar" | "regex" if openai.is_none() => {
                let Some(text) = value.as_str() else {
                    return bad("a text");
                };
                let form = if key == "regex" {
                    Form::Regex
                } else {
                    Form::Grammar
                };
                self.rest.form = Some((form, text.to_string()));
            }
            "n" if value != 1 => return bad("1"),
            "stream" if value != false => return bad("false"),
            "n" | "stream" => {}
            _ if IGNORED.contains(&key) => {}
            "temperature" => self.setting("temp", key, value)?,
            _ if settings().any(|s| s.is_called(key)) => self.setting(key, key, value)?,
            _ => {
                let expected = "one that octet knows";
                return Err(Error::request("a field", expected, brief(&key.into())));
            }
        }
        Ok(())
    }

    /// A sampler's setting: a number, a string, or a list of strings; biases may be an object.
    fn setting(&mut self, name: &str, key: &str, value: &Value) -> Result<()> {
        let plain = |value: &Value| match value {
            Value::String(text) => Some(text.clone()),
            Value::Number(number) => Some(number.to_string()),
            _ => None,
        };
        let signed = |(id, bias): (&String, &Value)| {
            let bias = plain(bias)?;
            let plus = if bias.starts_with('-') { "" } else { "+" };
            Some(format!("{id}{plus}{bias}"))
        };
        let texts: Option<Vec<String>> = match value {
            Value::Array(list) => list.iter().map(plain).collect(),
            Value::Object(biases) => biases.iter().map(signed).collect(),
            one => plain(one).map(|text| vec![text]),
        };
        let bad = |expected: &str| Error::request(key, expected, brief(value));
        let texts = texts.ok_or_else(|| bad("a number, or text"))?;
        let setting = settings()
            .find(|s| s.is_called(name))
            .ok_or_else(|| bad("a setting"))?;
        // A list replaces what was there.
        let first = setting.is_list().then_some("none");
        for text in first.into_iter().chain(texts.iter().map(String::as_str)) {
            setting
                .set(&mut self.rest.sampling, text)
                .map_err(|e| bad(e.strip_prefix("expected ").unwrap_or(&e)))?;
        }
        Ok(())
    }

    /// The prompt.
    fn prompt(
        &self,
        openai: Option<Object>,
        tokenizer: &Tokenizer,
        template: &Template,
    ) -> Result<Prompt> {
        let text = |ids| match self.tools {
            [] => Ok(Prompt {
                object: Object::Text,
                ids,
                calls: None,
            }),
            tools => {
                let expected = "none for a text that is to be continued";
                Err(Error::request("tools", expected, tools.len()))
            }
        };
        let messages = match (self.messages, self.prompt, openai) {
            (Some(messages), None, None | Some(Object::Chat)) => Message::list_from_json(messages)?,
            (None, Some(prompt), None | Some(Object::Text)) => {
                if let Some(ids) = prompt.as_array() {
                    let id = |id: &Value| u32::try_from(id.as_u64()?).ok();
                    let ids = ids.iter().map(id).collect::<Option<_>>();
                    let bad = || Error::request("prompt", "text or token ids", brief(prompt));
                    return text(ids.ok_or_else(bad)?);
                }
                let Some(said) = prompt.as_str() else {
                    return Err(Error::request("prompt", "text or token ids", brief(prompt)));
                };
                if self.rest.raw || openai.is_some() {
                    return text(tokenizer.raw_prompt(said));
                }
                let system = self
                    .rest
                    .system
                    .iter()
                    .map(|s| Message::new(Role::System, s));
                system.chain([Message::new(Role::User, said)]).collect()
            }
            (Some(_), Some(_), _) => {
                return Err(Error::request("the prompt", "messages or prompt", "both"));
            }
            (_, _, openai) => {
                let expected = match openai {
                    None => "messages or prompt",
                    Some(Object::Chat) => "messages",
                    Some(Object::Text) => "prompt",
                };
                return Err(Error::request("the prompt", expected, "none"));
            }
        };
        let tools = Some(self.tools).filter(|tools| !tools.is_empty());
        if tools.is_some() && !template.shows_tools() {
            let expected = "a model whose prompt format has them";
            return Err(Error::request("tools", expected, template.name()));
        }
        Ok(Prompt {
            object: Object::Chat,
            ids: template.encode(tokenizer, &messages, tools)?,
            calls: tools.map(|_| messages.iter().map(|m| m.tool_calls.len()).sum()),
        })
    }
}

/// What all answers of a run have in common.
pub struct Answerer<'a> {
    /// The model's name.
    pub model: String,
    /// Changes whenever answers might.
    pub fingerprint: String,
    /// The vocabulary.
    pub tokenizer: &'a Tokenizer,
}

/// A request's answer, and what is needed to tell it.
pub struct Told<'a> {
    /// What the answer is called.
    pub id: String,
    /// What it looks like.
    pub object: Object,
    /// How many of the likeliest tokens it tells.
    pub logprobs: Option<usize>,
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// The seed that repeats it.
    pub seed: u64,
    /// Its text, and the calls in it.
    pub message: &'a Message,
    /// The answer.
    pub answer: &'a Answer,
}

impl Answerer<'_> {
    /// The body of OpenAI's response. `created` is 0: an answer does not depend on the time.
    pub fn body(&self, told: &Told<'_>) -> Value {
        let answer = told.answer;
        let (object, prefix) = match told.object {
            Object::Chat => ("chat.completion", "chatcmpl"),
            Object::Text => ("text_completion", "cmpl"),
        };
        let logprobs = told.logprobs.map(|k| match told.object {
            Object::Chat => self.chat_logprobs(answer, k),
            Object::Text => self.text_logprobs(answer, k),
        });
        let finish = match answer.finish {
            Finish::Stop if !told.message.tool_calls.is_empty() => "tool_calls",
            Finish::Stop => "stop",
            Finish::Length | Finish::ContextFull | Finish::Interrupted => "length",
        };
        let mut choice = json!({"index": 0});
        match told.object {
            Object::Chat => {
                let mut message = told.message.to_json();
                if finish == "tool_calls" && told.message.content.is_empty() {
                    message["content"] = Value::Null;
                }
                message["refusal"] = Value::Null;
                choice["message"] = message;
            }
            Object::Text => choice["text"] = told.message.content.as_str().into(),
        }
        choice["logprobs"] = logprobs.into();
        choice["finish_reason"] = finish.into();
        json!({
            "id": format!("{prefix}-{}", told.id),
            "object": object,
            "created": 0,
            "model": self.model,
            "choices": [choice],
            "usage": {
                "prompt_tokens": told.prompt_tokens,
                "completion_tokens": answer.tokens.len(),
                "total_tokens": told.prompt_tokens + answer.tokens.len(),
            },
            "system_fingerprint": self.fingerprint,
            "octet": {"seed": told.seed, "logits_hash": answer.stats.hash.to_string()},
        })
    }

    fn chat_logprobs(&self, answer: &Answer, k: usize) -> Value {
        let entry = |id: u32, logprob: f32| {
            let bytes = self.tokenizer.piece_bytes(id);
            json!({"token": self.token(id), "logprob": logprob, "bytes": bytes})
        };
        let content = answer.each().map(|(id, logprob, top)| {
            let mut token = entry(id, logprob);
            token["top_logprobs"] = top[..k.min(top.len())]
                .iter()
                .map(|(id, p)| entry(*id, *p))
                .collect();
            token
        });
        json!({"content": content.collect::<Vec<_>>(), "refusal": null})
    }

    /// Offsets are characters of the answer's pieces, put together.
    fn text_logprobs(&self, answer: &Answer, k: usize) -> Value {
        let (mut tokens, mut offsets, mut tops) = (Vec::new(), Vec::new(), Vec::new());
        let mut offset = 0;
        for (id, _, top) in answer.each() {
            let token = self.token(id);
            offsets.push(offset);
            offset += token.chars().count();
            tokens.push(token);
            let top = top[..k.min(top.len())].iter();
            tops.push(
                top.map(|(id, p)| (self.token(*id), json!(p)))
                    .collect::<Map<_, _>>(),
            );
        }
        json!({
            "tokens": tokens,
            "token_logprobs": answer.logprobs,
            "top_logprobs": tops,
            "text_offset": offsets,
        })
    }

    /// A token as text; part of a character is written `<0xNN>`, a mark by its name.
    fn token(&self, id: u32) -> String {
        let bytes = self.tokenizer.piece_bytes(id);
        match String::from_utf8(bytes) {
            Ok(text) if !text.is_empty() => text,
            _ => self
                .tokenizer
                .piece(id)
                .map_or_else(String::new, |p| p.text.clone()),
        }
    }
}
