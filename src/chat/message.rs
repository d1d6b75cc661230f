//! A message of a conversation, in OpenAI's shape.

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::{Value, json};

use super::json::Json;
use crate::error::{Error, Result};

/// Who speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Sets the scene.
    System,
    /// Asks.
    User,
    /// Answers: the model.
    Assistant,
    /// Gives the result of a tool call.
    Tool,
}

impl Role {
    /// The role's name in JSON.
    pub fn name(self) -> &'static str {
        match self {
            Role::System => "system",
            Role::User => "user",
            Role::Assistant => "assistant",
            Role::Tool => "tool",
        }
    }

    fn from_name(name: &str) -> Option<Role> {
        [Role::System, Role::User, Role::Assistant, Role::Tool]
            .into_iter()
            .find(|role| role.name() == name)
    }
}

/// A call of a tool, made by the model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ToolCall {
    /// Joins the call to its result. V3 wants 9 letters or digits; `"null"` where the message has none.
    pub id: String,
    /// The function's name.
    pub name: String,
    /// The arguments, as JSON text.
    pub arguments: String,
}

/// One message of a conversation. In JSON it has OpenAI's shape.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    /// Who speaks.
    pub role: Role,
    /// The text. A list of text chunks in JSON is joined with blank lines.
    pub content: String,
    /// The calls of an assistant's message.
    pub tool_calls: Vec<ToolCall>,
    /// Which call a tool's message answers.
    pub tool_call_id: Option<String>,
    /// The tool's name in a tool's message; not part of any prompt here.
    pub name: Option<String>,
    /// The last message is the beginning of the answer: it is not closed, the model goes on with it.
    pub prefix: bool,
}

impl Message {
    /// A message of text only.
    pub fn new(role: Role, content: impl Into<String>) -> Message {
        Message {
            role,
            content: content.into(),
            tool_calls: Vec::new(),
            tool_call_id: None,
            name: None,
            prefix: false,
        }
    }

    /// A message from OpenAI's JSON shape; unknown keys are ignored.
    ///
    /// Errors: [`Error::Prompt`] for an unknown role, content that is not text, or fields of the wrong type.
    pub fn from_json(value: &Value) -> Result<Message> {
        let role = value["role"]
            .as_str()
            .and_then(Role::from_name)
            .ok_or_else(|| {
                Error::prompt(
                    "a message's role",
                    "system, user, assistant or tool",
                    brief(&value["role"]),
                )
            })?;
        let mut message = Message::new(role, text_content(role, &value["content"])?);
        message.tool_call_id = optional_text(value, "tool_call_id")?;
        message.name = optional_text(value, "name")?;
        message.prefix = match &value["prefix"] {
            Value::Null => false,
            Value::Bool(prefix) => *prefix,
            other => {
                return Err(Error::prompt(
                    "a message's prefix",
                    "true or false",
                    brief(other),
                ));
            }
        };
        match &value["tool_calls"] {
            Value::Null => {}
            Value::Array(calls) => {
                message.tool_calls = calls.iter().map(tool_call).collect::<Result<_>>()?;
            }
            other => {
                return Err(Error::prompt(
                    "a message's tool_calls",
                    "a list",
                    brief(other),
                ));
            }
        }
        Ok(message)
    }

    /// The message in OpenAI's JSON shape; what [`Message::from_json`] reads back.
    pub fn to_json(&self) -> Value {
        let mut value = json!({"role": self.role.name(), "content": self.content});
        if !self.tool_calls.is_empty() {
            let call = |c: &ToolCall| json!({"id": c.id, "type": "function", "function": {"name": c.name, "arguments": c.arguments}});
            value["tool_calls"] = self.tool_calls.iter().map(call).collect();
        }
        if let Some(id) = &self.tool_call_id {
            value["tool_call_id"] = id.as_str().into();
        }
        if let Some(name) = &self.name {
            value["name"] = name.as_str().into();
        }
        if self.prefix {
            value["prefix"] = true.into();
        }
        value
    }

    /// The messages of a JSON list. Errors as [`Message::from_json`].
    pub fn list_from_json(value: &Value) -> Result<Vec<Message>> {
        value
            .as_array()
            .ok_or_else(|| Error::prompt("the messages", "a list", brief(value)))?
            .iter()
            .map(Message::from_json)
            .collect()
    }
}

impl<'de> Deserialize<'de> for Message {
    fn deserialize<D: Deserializer<'de>>(
        deserializer: D,
    ) -> std::result::Result<Message, D::Error> {
        let value = Value::deserialize(deserializer)?;
        Message::from_json(&value).map_err(serde::de::Error::custom)
    }
}

impl Serialize for Message {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        self.to_json().serialize(serializer)
    }
}

/// A value as an error shows it.
pub(super) fn brief(value: &Value) -> String {
    match value {
        Value::Null => "none".to_string(),
        value => beginning(&value.to_string()),
    }
}

/// The beginning of a text, as an error shows it.
pub(super) fn beginning(text: &str) -> String {
    const SHOWN: usize = 60;
    match text.char_indices().nth(SHOWN) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_string(),
    }
}

fn optional_text(value: &Value, key: &str) -> Result<Option<String>> {
    match &value[key] {
        Value::Null => Ok(None),
        Value::String(text) => Ok(Some(text.clone())),
        other => Err(Error::prompt(
            format!("a message's {key}"),
            "a string",
            brief(other),
        )),
    }
}

/// A string, a list of text chunks, or (for the assistant) nothing.
fn text_content(role: Role, content: &Value) -> Result<String> {
    let bad = |found: &Value| {
        let what = format!("the content of the {} message", role.name());
        Err(Error::prompt(
            what,
            "text or a list of text chunks",
            brief(found),
        ))
    };
    match content {
        Value::String(text) => Ok(text.clone()),
        Value::Null if role == Role::Assistant => Ok(String::new()),
        Value::Array(chunks) => {
            let mut texts = Vec::new();
            for chunk in chunks {
                match (chunk["type"].as_str(), chunk["text"].as_str()) {
                    (Some("text"), Some(text)) => texts.push(text),
                    _ => return bad(chunk),
                }
            }
            Ok(join(texts.into_iter()))
        }
        other => bad(other),
    }
}

fn tool_call(value: &Value) -> Result<ToolCall> {
    let function = &value["function"];
    if !matches!(value["type"].as_str().unwrap_or("function"), "function") {
        return Err(Error::prompt(
            "a tool call's type",
            "function",
            brief(&value["type"]),
        ));
    }
    let name = function["name"].as_str().ok_or_else(|| {
        Error::prompt(
            "a tool call's function name",
            "a string",
            brief(&function["name"]),
        )
    })?;
    let arguments = match &function["arguments"] {
        Value::Null => "{}".to_string(),
        Value::String(text) => text.clone(),
        object @ Value::Object(_) => Json::from(object).dump(),
        other => {
            return Err(Error::prompt(
                "a tool call's arguments",
                "JSON text or an object",
                brief(other),
            ));
        }
    };
    Ok(ToolCall {
        id: optional_text(value, "id")?.unwrap_or_else(|| "null".into()),
        name: name.to_string(),
        arguments,
    })
}

/// Texts of one speaker in a row are one text; empty ones leave no trace.
pub(super) fn join<'a>(texts: impl Iterator<Item = &'a str>) -> String {
    texts
        .filter(|text| !text.is_empty())
        .collect::<Vec<_>>()
        .join("\n\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_survive_json() {
        let mut call = Message::new(Role::Assistant, "");
        let arguments = "{\"a\": 1}".to_string();
        call.tool_calls.push(ToolCall {
            id: "abcdefgh1".into(),
            name: "f".into(),
            arguments,
        });
        let mut result = Message::new(Role::Tool, "{}");
        result.tool_call_id = Some("abcdefgh1".into());
        result.name = Some("f".into());
        let mut prefix = Message::new(Role::Assistant, "So \u{0}\"");
        prefix.prefix = true;
        for message in [call, result, prefix, Message::new(Role::System, "é")] {
            let text = serde_json::to_string(&message).unwrap();
            assert_eq!(serde_json::from_str::<Message>(&text).unwrap(), message);
        }
    }

    #[test]
    fn odd_messages_are_named() {
        for (json, word) in [
            (r#"{}"#, "role"),
            (r#"3"#, "role"),
            (r#"{"role":"x","content":"a"}"#, "role"),
            (r#"{"role":"user"}"#, "content of the user message"),
            (
                r#"{"role":"user","content":{"a":1}}"#,
                "content of the user message",
            ),
            (
                r#"{"role":"user","content":[{"type":"image_url"}]}"#,
                "text chunks",
            ),
            (
                r#"{"role":"tool","content":"","tool_call_id":3}"#,
                "tool_call_id",
            ),
            (r#"{"role":"assistant","prefix":1}"#, "prefix"),
            (r#"{"role":"assistant","tool_calls":{}}"#, "tool_calls"),
            (r#"{"role":"assistant","tool_calls":[3]}"#, "function name"),
            (
                r#"{"role":"assistant","tool_calls":[{"type":"x","function":{"name":"f"}}]}"#,
                "type",
            ),
            (
                r#"{"role":"assistant","tool_calls":[{"function":{"name":"f","arguments":[]}}]}"#,
                "arguments",
            ),
        ] {
            let value: Value = serde_json::from_str(json).unwrap();
            let error = Message::from_json(&value).unwrap_err();
            assert!(
                matches!(error, Error::Prompt { .. }) && error.to_string().contains(word),
                "{json}: {error}"
            );
        }
        assert!(Message::list_from_json(&json!({"role": "user"})).is_err());
    }
}
