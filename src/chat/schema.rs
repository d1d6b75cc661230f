//! Whether a tool's parameters, or the form of an answer, are a JSON Schema (draft 7).
//!
//! The prompt formats with tools refuse a tool whose `parameters` are no valid schema, so the meta-schema
//! (<https://json-schema.org/draft-07/schema>) is written down here as one table of keywords.

use super::message::beginning;
use serde_json::Value;

/// What a keyword's value must be.
enum Rule {
    Text,
    Pattern,
    Bool,
    Number,
    Positive,
    Count,
    List,
    Schema,
    SchemaList,
    SchemaMap,
    PatternMap,
    SchemaOrList,
    TextSet,
    Dependencies,
    Types,
}

/// The draft's keywords; others may be anything.
const KEYWORDS: &[(&str, Rule)] = &[
    ("$id", Rule::Text),
    ("$schema", Rule::Text),
    ("$ref", Rule::Text),
    ("$comment", Rule::Text),
    ("title", Rule::Text),
    ("description", Rule::Text),
    ("format", Rule::Text),
    ("contentMediaType", Rule::Text),
    ("contentEncoding", Rule::Text),
    ("pattern", Rule::Pattern),
    ("readOnly", Rule::Bool),
    ("uniqueItems", Rule::Bool),
    ("maximum", Rule::Number),
    ("exclusiveMaximum", Rule::Number),
    ("minimum", Rule::Number),
    ("exclusiveMinimum", Rule::Number),
    ("multipleOf", Rule::Positive),
    ("maxLength", Rule::Count),
    ("minLength", Rule::Count),
    ("maxItems", Rule::Count),
    ("minItems", Rule::Count),
    ("maxProperties", Rule::Count),
    ("minProperties", Rule::Count),
    ("examples", Rule::List),
    ("enum", Rule::List),
    ("additionalItems", Rule::Schema),
    ("contains", Rule::Schema),
    ("additionalProperties", Rule::Schema),
    ("propertyNames", Rule::Schema),
    ("if", Rule::Schema),
    ("then", Rule::Schema),
    ("else", Rule::Schema),
    ("not", Rule::Schema),
    ("allOf", Rule::SchemaList),
    ("anyOf", Rule::SchemaList),
    ("oneOf", Rule::SchemaList),
    ("definitions", Rule::SchemaMap),
    ("properties", Rule::SchemaMap),
    ("patternProperties", Rule::PatternMap),
    ("items", Rule::SchemaOrList),
    ("required", Rule::TextSet),
    ("dependencies", Rule::Dependencies),
    ("type", Rule::Types),
];

const TYPES: [&str; 7] = [
    "array", "boolean", "integer", "null", "number", "object", "string",
];

/// What is wrong with a schema: (where, expected, found).
pub(super) type Fault = (String, &'static str, String);

/// Checks a schema, which a fault calls `place`, against draft 7's meta-schema.
pub(super) fn check(schema: &Value, place: &str) -> Result<(), Fault> {
    let map = match schema {
        Value::Bool(_) => return Ok(()),
        Value::Object(map) => map,
        _ => return fault(place, "a schema (an object or a boolean)", schema),
    };
    for (key, value) in map {
        let Some((_, rule)) = KEYWORDS.iter().find(|(name, _)| name == key) else {
            continue;
        };
        rule.check(value, &format!("{place}.{key}"))?;
    }
    Ok(())
}

fn fault(place: &str, expected: &'static str, found: &Value) -> Result<(), Fault> {
    Err((place.to_string(), expected, beginning(&found.to_string())))
}

impl Rule {
    fn check(&self, value: &Value, place: &str) -> Result<(), Fault> {
        let each = |values: &[Value]| {
            values
                .iter()
                .enumerate()
                .try_for_each(|(i, v)| check(v, &format!("{place}.{i}")))
        };
        let (good, expected) = match self {
            Rule::Text => (value.is_string(), "a string"),
            Rule::Pattern => (value.as_str().is_some_and(is_regex), "a regular expression"),
            Rule::Bool => (value.is_boolean(), "true or false"),
            Rule::Number => (value.is_number(), "a number"),
            Rule::Positive => (value.as_f64().is_some_and(|x| x > 0.0), "a number above 0"),
            // 3.0 counts as an integer in JSON Schema.
            Rule::Count => (
                value.as_f64().is_some_and(|x| x >= 0.0 && x.fract() == 0.0),
                "an integer from 0",
            ),
            Rule::List => (value.is_array(), "a list"),
            Rule::Schema => return check(value, place),
            Rule::SchemaList => match value.as_array().filter(|list| !list.is_empty()) {
                Some(list) => return each(list),
                None => (false, "a list of schemas"),
            },
            Rule::SchemaOrList => match value.as_array() {
                Some(list) if list.is_empty() => (false, "a schema or a list of schemas"),
                Some(list) => return each(list),
                None => return check(value, place),
            },
            Rule::SchemaMap | Rule::PatternMap => match value.as_object() {
                Some(map) => {
                    for (key, schema) in map {
                        if matches!(self, Rule::PatternMap) && !is_regex(key) {
                            return fault(
                                place,
                                "regular expressions as keys",
                                &Value::from(key.as_str()),
                            );
                        }
                        check(schema, &format!("{place}.{key}"))?;
                    }
                    return Ok(());
                }
                None => (false, "an object of schemas"),
            },
            Rule::TextSet => (is_text_set(value), "a list of different strings"),
            Rule::Dependencies => match value.as_object() {
                Some(map) => {
                    return map
                        .iter()
                        .filter(|(_, v)| !is_text_set(v))
                        .try_for_each(|(key, v)| check(v, &format!("{place}.{key}")));
                }
                None => (false, "an object"),
            },
            Rule::Types => {
                let simple = |v: &Value| v.as_str().is_some_and(|t| TYPES.contains(&t));
                let list = |list: &Vec<Value>| {
                    !list.is_empty() && list.iter().all(simple) && is_text_set(value)
                };
                (
                    simple(value) || value.as_array().is_some_and(list),
                    "a JSON type or a list of them",
                )
            }
        };
        if good {
            Ok(())
        } else {
            fault(place, expected, value)
        }
    }
}

fn is_text_set(value: &Value) -> bool {
    let Some(list) = value.as_array() else {
        return false;
    };
    let mut seen = std::collections::HashSet::new();
    list.iter()
        .all(|v| v.as_str().is_some_and(|s| seen.insert(s)))
}

/// Whether a pattern has the outer form of a regular expression: brackets closed, nothing repeated that is not there.
/// (A pattern that passes here and is wrong deeper inside does no harm: it is only shown to the model.)
fn is_regex(pattern: &str) -> bool {
    let mut chars = pattern.chars().peekable();
    let mut open = 0usize;
    let mut repeatable = false;
    while let Some(c) = chars.next() {
        match c {
            '\\' => {
                if chars.next().is_none() {
                    return false;
                }
                repeatable = true;
            }
            '[' => {
                // A bracket that comes first, also after ^, is a member of the class.
                chars.next_if_eq(&'^');
                chars.next_if_eq(&']');
                loop {
                    match chars.next() {
                        Some(']') => break,
                        Some('\\') => drop(chars.next()),
                        Some(_) => {}
                        None => return false,
                    }
                }
                repeatable = true;
            }
            '(' => {
                open += 1;
                repeatable = false;
                chars.next_if_eq(&'?'); // (?:…), (?=…), (?P<…>…)
            }
            ')' => match open.checked_sub(1) {
                Some(rest) => (open, repeatable) = (rest, true),
                None => return false,
            },
            '|' => repeatable = false,
            '*' | '+' | '?' if !repeatable => return false,
            '^' => repeatable = true, // Python lets anchors be repeated
            _ => repeatable = true,
        }
    }
    open == 0
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn schemas_are_taken_as_the_meta_schema_says() {
        for good in [
            json!({}),
            json!(true),
            json!({"type": "object", "properties": {"a": {"type": ["string", "null"]}, "b": true}, "required": ["a"]}),
            json!({"items": [{}, false], "minItems": 0, "maxItems": 3.0, "multipleOf": 0.5, "enum": [1, "x"]}),
            json!({"dependencies": {"a": ["b"], "c": {"not": {}}}, "x-own": 3, "pattern": "^[a-z]+(x|\\d)*$"}),
            json!({"patternProperties": {"^a": {}}, "anyOf": [{}], "default": 3, "const": null, "required": []}),
        ] {
            assert_eq!(check(&good, "parameters"), Ok(()), "{good}");
        }
        for (bad, place) in [
            (json!(3), "parameters"),
            (json!({"type": "text"}), "parameters.type"),
            (json!({"type": []}), "parameters.type"),
            (json!({"type": ["null", "null"]}), "parameters.type"),
            (json!({"type": null}), "parameters.type"),
            (json!({"properties": ["a"]}), "parameters.properties"),
            (
                json!({"properties": {"a": "string"}}),
                "parameters.properties.a",
            ),
            (
                json!({"properties": {"a": {"type": "int"}}}),
                "parameters.properties.a.type",
            ),
            (json!({"required": "a"}), "parameters.required"),
            (json!({"required": ["a", "a"]}), "parameters.required"),
            (json!({"required": [1]}), "parameters.required"),
            (json!({"minLength": -1}), "parameters.minLength"),
            (json!({"minLength": 1.5}), "parameters.minLength"),
            (json!({"maximum": true}), "parameters.maximum"),
            (json!({"multipleOf": 0}), "parameters.multipleOf"),
            (json!({"enum": "a"}), "parameters.enum"),
            (json!({"items": []}), "parameters.items"),
            (json!({"items": {"type": 3}}), "parameters.items.type"),
            (json!({"allOf": []}), "parameters.allOf"),
            (json!({"oneOf": [{}, 3]}), "parameters.oneOf.1"),
            (json!({"not": 3}), "parameters.not"),
            (
                json!({"dependencies": {"a": [1]}}),
                "parameters.dependencies.a",
            ),
            (json!({"pattern": "(a"}), "parameters.pattern"),
            (json!({"pattern": "[a"}), "parameters.pattern"),
            (json!({"pattern": "*a"}), "parameters.pattern"),
            (json!({"pattern": "a)"}), "parameters.pattern"),
            (json!({"pattern": "a\\"}), "parameters.pattern"),
            (
                json!({"patternProperties": {"[": {}}}),
                "parameters.patternProperties",
            ),
            (json!({"description": 3}), "parameters.description"),
            (json!({"uniqueItems": 1}), "parameters.uniqueItems"),
        ] {
            assert_eq!(check(&bad, "parameters").unwrap_err().0, place, "{bad}");
        }
    }
}
