//! Tools that a model may call: declared in a file, called in an answer, run by a command of the user's.

use super::json::{self, Json};
use super::message::{ToolCall, brief};
use super::schema;
use crate::bounded;
use crate::disk;
use crate::error::{Error, Result};
use serde_json::Value;
use std::path::Path;

/// The largest file of tools that is read, in bytes.
const MAX_FILE: u64 = 4 << 20;

/// The tools that a file declares: a list in the shape of OpenAI's `tools`.
///
/// # Errors
/// If it cannot be read, is no such list, or a tool in it is none.
pub fn read_tools(path: &Path) -> Result<Vec<Value>> {
    let text = disk::utf8(path, disk::read(path, MAX_FILE)?)?;
    let wrong = |found: &dyn std::fmt::Display| {
        let expected = "a JSON list of {\"type\": \"function\", \"function\": {\"name\": …}}";
        Error::invalid(path, "the list of tools", expected, found)
    };
    let value = bounded::json(text.as_bytes()).map_err(|e| wrong(&e))?;
    let Value::Array(tools) = value else {
        return Err(wrong(&"another value"));
    };
    for tool in &tools {
        check_tool(tool).map_err(|e| wrong(&e))?;
    }
    Ok(tools)
}

/// Whether a function may be called so.
pub(super) fn check_name(name: &str) -> Result<()> {
    let good = |b: u8| b.is_ascii_alphanumeric() || b == b'_' || b == b'-';
    if (1..=64).contains(&name.len()) && name.bytes().all(good) {
        return Ok(());
    }
    Err(Error::prompt(
        "a function's name",
        "1 to 64 of a-z, A-Z, 0-9, _ and -",
        format!("{name:?}"),
    ))
}

/// A tool must be a function with a name and, if it has parameters, a JSON Schema for them.
pub(super) fn check_tool(tool: &Value) -> Result<()> {
    let function = &tool["function"];
    if !matches!(&tool["type"], Value::Null) && tool["type"] != "function" {
        return Err(Error::prompt(
            "a tool's type",
            "function",
            brief(&tool["type"]),
        ));
    }
    let Some(name) = function["name"].as_str() else {
        let expected = "{\"type\": \"function\", \"function\": {\"name\": …}}";
        return Err(Error::prompt("a tool", expected, brief(tool)));
    };
    check_name(name)?;
    if !matches!(&function["description"], Value::Null | Value::String(_)) {
        return Err(Error::prompt(
            "a tool's description",
            "a string",
            brief(&function["description"]),
        ));
    }
    match &function["parameters"] {
        Value::Null => Ok(()),
        parameters @ Value::Object(_) => {
            schema::check(parameters, "parameters").map_err(|(place, expected, found)| {
                Error::prompt(
                    format!("the JSON Schema of tool {name}: {place}"),
                    expected,
                    found,
                )
            })
        }
        other => Err(Error::prompt(
            "a tool's parameters",
            "an object",
            brief(other),
        )),
    }
}

/// The calls that a model wrote: `[{"name": …, "arguments": {…}}, …]`, or one of them without the list. `taken`
/// ids are not given again.
///
/// # Errors
/// [`Error::Prompt`]: what was expected, and what the model wrote.
pub(super) fn parse_calls(text: &str, taken: usize) -> Result<Vec<ToolCall>> {
    let wrong = |expected: &str| {
        let found: String = text.chars().take(80).collect();
        Error::prompt("the model's tool call", expected, format!("{found:?}"))
    };
    let calls = match json::parse(text) {
        Ok(Json::List(calls)) if !calls.is_empty() => calls,
        Ok(call @ Json::Object(_)) => vec![call],
        _ => return Err(wrong("a JSON list of calls")),
    };
    let mut parsed = Vec::new();
    for call in calls {
        let Json::Object(keys) = call else {
            return Err(wrong("a call to be a JSON object"));
        };
        let get = |name: &str| keys.iter().find(|(key, _)| key == name).map(|(_, v)| v);
        let Some(Json::Text(name)) = get("name") else {
            return Err(wrong("a call with a name"));
        };
        check_name(name)?;
        let arguments = match get("arguments") {
            None | Some(Json::Null) => "{}".to_string(),
            Some(Json::Text(text)) => text.clone(),
            Some(object @ Json::Object(_)) => object.dump(),
            Some(_) => return Err(wrong("arguments that are a JSON object")),
        };
        // Models leave ids out, or write one that prompts do not allow.
        let id = format!("call{:05}", (taken + parsed.len()) % 100_000);
        parsed.push(ToolCall {
            id,
            name: name.clone(),
            arguments,
        });
    }
    Ok(parsed)
}

/// What begins a call in the answers of many finetunes, and what ends it.
const MARKS: [&str; 2] = ["<tool_call>", "</tool_call>"];

/// What an answer says before its first marked call.
pub(super) fn before_calls(text: &str) -> &str {
    text.split(MARKS[0]).next().unwrap_or_default().trim_end()
}

/// The calls within marks in an answer; none if there are no marks.
///
/// # Errors
/// As [`parse_calls`].
pub(super) fn marked_calls(text: &str, taken: usize) -> Result<Vec<ToolCall>> {
    let mut calls = Vec::new();
    for part in text.split(MARKS[0]).skip(1) {
        let call = part.split(MARKS[1]).next().unwrap_or_default();
        calls.extend(parse_calls(call.trim(), taken + calls.len())?);
    }
    Ok(calls)
}
