//! JSON as Python's `json` module reads and writes it.
//!
//! The V3 prompt format contains JSON that the official implementation makes with `json.loads` and
//! `json.dumps(…, ensure_ascii=False)`. The model was trained on exactly that text, so numbers, spaces and escapes must be
//! the same: `", "` and `": "` as separators, integers of any size, `1e5` as `100000.0`, `NaN` taken and
//! given, the last of equal keys in the first one's place. `serde_json` cannot keep all of that.

use std::fmt::Write;

use serde_json::Value;

use crate::bounded;

/// A JSON value, as Python sees it.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Json {
    Null,
    Bool(bool),
    /// The digits of an integer, as Python prints it.
    Int(String),
    Float(f64),
    Text(String),
    List(Vec<Json>),
    /// In order; keys are unique.
    Object(Vec<(String, Json)>),
}

/// Why a text is not a value.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum NotJson {
    /// It is not JSON; prompt formats then take it as plain text.
    Text,
    /// It is JSON that Python itself fails on, or that cannot be written as UTF-8; says what.
    Refused(&'static str),
}

/// The deepest nesting that is read. Python's own limit is about a thousand levels.
const MAX_DEPTH: usize = 900;
/// The longest integer that Python converts, in digits (`sys.int_info.default_max_str_digits`).
const MAX_DIGITS: usize = 4300;

/// `json.loads`.
pub(super) fn parse(text: &str) -> Result<Json, NotJson> {
    if bounded::is_too_much(text.as_bytes()) {
        return Err(NotJson::Refused(bounded::TOO_MUCH));
    }
    let mut parser = Parser { text, at: 0 };
    parser.space();
    let value = parser.value(0)?;
    parser.space();
    if parser.at < text.len() {
        return Err(NotJson::Text);
    }
    Ok(value)
}

struct Parser<'a> {
    text: &'a str,
    at: usize,
}

impl Parser<'_> {
    fn peek(&self) -> Option<u8> {
        self.text.as_bytes().get(self.at).copied()
    }

    fn space(&mut self) {
        while let Some(b' ' | b'\t' | b'\n' | b'\r') = self.peek() {
            self.at += 1;
        }
    }

    fn eat(&mut self, word: &str) -> bool {
        let found = self.text[self.at..].starts_with(word);
        if found {
            self.at += word.len();
        }
        found
    }

    fn value(&mut self, depth: usize) -> Result<Json, NotJson> {
        if depth > MAX_DEPTH {
            return Err(NotJson::Refused("JSON nested deeper than 900 levels"));
        }
        match self.peek().ok_or(NotJson::Text)? {
            b'"' => self.string().map(Json::Text),
            b'[' => self.list(depth),
            b'{' => self.object(depth),
            b'n' if self.eat("null") => Ok(Json::Null),
            b't' if self.eat("true") => Ok(Json::Bool(true)),
            b'f' if self.eat("false") => Ok(Json::Bool(false)),
            b'N' if self.eat("NaN") => Ok(Json::Float(f64::NAN)),
            b'I' if self.eat("Infinity") => Ok(Json::Float(f64::INFINITY)),
            b'-' if self.eat("-Infinity") => Ok(Json::Float(f64::NEG_INFINITY)),
            b'-' | b'0'..=b'9' => self.number(),
            _ => Err(NotJson::Text),
        }
    }

    fn list(&mut self, depth: usize) -> Result<Json, NotJson> {
        let mut items = Vec::new();
        self.at += 1;
        self.space();
        if self.eat("]") {
            return Ok(Json::List(items));
        }
        loop {
            self.space();
            items.push(self.value(depth + 1)?);
            self.space();
            if self.eat("]") {
                return Ok(Json::List(items));
            }
            if !self.eat(",") {
                return Err(NotJson::Text);
            }
        }
    }

    fn object(&mut self, depth: usize) -> Result<Json, NotJson> {
        // A map from key to place, so that equal keys do not take quadratic time.
        let mut places = std::collections::HashMap::new();
        let mut items: Vec<(String, Json)> = Vec::new();
        self.at += 1;
        self.space();
        if self.eat("}") {
            return Ok(Json::Object(items));
        }
        loop {
            self.space();
            if self.peek() != Some(b'"') {
                return Err(NotJson::Text);
            }
            let key = self.string()?;
            self.space();
            if !self.eat(":") {
                return Err(NotJson::Text);
            }
            self.space();
            let value = self.value(depth + 1)?;
            match places.get(&key) {
                Some(&place) => {
                    let item: &mut (String, Json) = &mut items[place];
                    item.1 = value;
                }
                None => {
                    places.insert(key.clone(), items.len());
                    items.push((key, value));
                }
            }
            self.space();
            if self.eat("}") {
                return Ok(Json::Object(items));
            }
            if !self.eat(",") {
                return Err(NotJson::Text);
            }
        }
    }

    fn digits(&mut self) -> usize {
        let start = self.at;
        while let Some(b'0'..=b'9') = self.peek() {
            self.at += 1;
        }
        self.at - start
    }

    fn number(&mut self) -> Result<Json, NotJson> {
        let start = self.at;
        let negative = self.eat("-");
        let whole = self.at;
        if !self.eat("0") && self.digits() == 0 {
            return Err(NotJson::Text);
        }
        let integer = &self.text[whole..self.at];
        // A fraction or an exponent counts only if digits follow; else it is trailing garbage.
        let mut float = false;
        let mark = self.at;
        if self.eat(".") {
            if self.digits() > 0 {
                float = true
            } else {
                self.at = mark
            }
        }
        let mark = self.at;
        if self.eat("e") || self.eat("E") {
            let _ = self.eat("+") || self.eat("-");
            if self.digits() > 0 {
                float = true
            } else {
                self.at = mark
            }
        }
        if float {
            // Rust and Python both round to nearest; both read 1e999 as infinity.
            return self.text[start..self.at]
                .parse()
                .map(Json::Float)
                .map_err(|_| NotJson::Text);
        }
        if integer.len() > MAX_DIGITS {
            return Err(NotJson::Refused("an integer of more than 4300 digits"));
        }
        let sign = if negative && integer != "0" { "-" } else { "" };
        Ok(Json::Int(format!("{sign}{integer}")))
    }

    fn hex4(&mut self) -> Result<u32, NotJson> {
        let digits = self.text.get(self.at..self.at + 4).ok_or(NotJson::Text)?;
        if !digits.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Err(NotJson::Text);
        }
        self.at += 4;
        u32::from_str_radix(digits, 16).map_err(|_| NotJson::Text)
    }

    fn string(&mut self) -> Result<String, NotJson> {
        let mut out = String::new();
        let mut lone_surrogate = false;
        self.at += 1;
        loop {
            let rest = &self.text[self.at..];
            let stop = rest
                .find(|c: char| c == '"' || c == '\\' || c < ' ')
                .ok_or(NotJson::Text)?;
            out.push_str(&rest[..stop]);
            self.at += stop + 1;
            match rest.as_bytes()[stop] {
                b'"' => break,
                b'\\' => {}
                _ => return Err(NotJson::Text), // a raw control character
            }
            let escape = self.peek().ok_or(NotJson::Text)?;
            self.at += 1;
            out.push(match escape {
                b'"' | b'\\' | b'/' => escape as char,
                b'b' => '\x08',
                b'f' => '\x0c',
                b'n' => '\n',
                b'r' => '\r',
                b't' => '\t',
                b'u' => {
                    let mut code = self.hex4()?;
                    if (0xD800..0xDC00).contains(&code) && self.text[self.at..].starts_with("\\u") {
                        let back = self.at;
                        self.at += 2;
                        match self.hex4()? {
                            low @ 0xDC00..0xE000 => {
                                code = 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00)
                            }
                            _ => self.at = back,
                        }
                    }
                    char::from_u32(code).unwrap_or_else(|| {
                        lone_surrogate = true;
                        char::REPLACEMENT_CHARACTER
                    })
                }
                _ => return Err(NotJson::Text),
            });
        }
        if lone_surrogate {
            return Err(NotJson::Refused(
                "half of a UTF-16 surrogate pair, which is no character",
            ));
        }
        Ok(out)
    }
}

impl Json {
    /// `json.dumps(value, ensure_ascii=False)`.
    pub(super) fn dump(&self) -> String {
        let mut out = String::new();
        self.write(&mut out, None, 0);
        out
    }

    /// `json.dumps(value, ensure_ascii=False, indent=indent)`.
    pub(super) fn dump_indented(&self, indent: usize) -> String {
        let mut out = String::new();
        self.write(&mut out, Some(indent), 0);
        out
    }

    fn write(&self, out: &mut String, indent: Option<usize>, depth: usize) {
        // Before item `i`, or before the closing bracket (`None`).
        let part = |out: &mut String, i: Option<usize>| match (i, indent) {
            (Some(i), None) if i > 0 => out.push_str(", "),
            (_, None) => {}
            (i, Some(indent)) => {
                if i.is_some_and(|i| i > 0) {
                    out.push(',');
                }
                out.push('\n');
                let levels = if i.is_some() { depth + 1 } else { depth };
                out.extend(std::iter::repeat_n(' ', levels * indent));
            }
        };
        match self {
            Json::Null => out.push_str("null"),
            Json::Bool(b) => out.push_str(if *b { "true" } else { "false" }),
            Json::Int(digits) => out.push_str(digits),
            Json::Float(x) => out.push_str(&python_float(*x)),
            Json::Text(text) => quote(text, out),
            Json::List(items) if items.is_empty() => out.push_str("[]"),
            Json::Object(items) if items.is_empty() => out.push_str("{}"),
            Json::List(items) => {
                out.push('[');
                for (i, item) in items.iter().enumerate() {
                    part(out, Some(i));
                    item.write(out, indent, depth + 1);
                }
                part(out, None);
                out.push(']');
            }
            Json::Object(items) => {
                out.push('{');
                for (i, (key, value)) in items.iter().enumerate() {
                    part(out, Some(i));
                    quote(key, out);
                    out.push_str(": ");
                    value.write(out, indent, depth + 1);
                }
                part(out, None);
                out.push('}');
            }
        }
    }
}

impl From<&Value> for Json {
    fn from(value: &Value) -> Json {
        match value {
            Value::Null => Json::Null,
            Value::Bool(b) => Json::Bool(*b),
            Value::Number(n) if n.is_f64() => Json::Float(n.as_f64().unwrap_or(f64::NAN)),
            Value::Number(n) => Json::Int(n.to_string()),
            Value::String(s) => Json::Text(s.clone()),
            Value::Array(items) => Json::List(items.iter().map(Json::from).collect()),
            Value::Object(map) => {
                Json::Object(map.iter().map(|(k, v)| (k.clone(), v.into())).collect())
            }
        }
    }
}

/// A JSON string with Python's escapes (`ensure_ascii=False`).
fn quote(text: &str, out: &mut String) {
    out.push('"');
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\x08' => out.push_str("\\b"),
            '\x0c' => out.push_str("\\f"),
            c if c < ' ' => {
                // Writing into a String cannot fail.
                let _ = write!(out, "\\u{:04x}", c as u32);
            }
            c => out.push(c),
        }
    }
    out.push('"');
}

/// Python's `repr(float)`: the shortest digits that read back the same, with an exponent below 1e-4 and from 1e16.
fn python_float(x: f64) -> String {
    if x.is_nan() {
        return "NaN".into();
    }
    if x.is_infinite() {
        return if x > 0.0 {
            "Infinity".into()
        } else {
            "-Infinity".into()
        };
    }
    // Rust's {:e} has the same shortest digits: d.ddde-5.
    let shortest = format!("{x:e}");
    let (digits, exponent) = shortest.split_once('e').unwrap_or((&shortest, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if x == 0.0 || (-4..16).contains(&exponent) {
        let plain = format!("{x}");
        return if plain.contains('.') {
            plain
        } else {
            plain + ".0"
        };
    }
    let sign = if exponent < 0 { '-' } else { '+' };
    format!("{digits}e{sign}{:02}", exponent.abs())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_written_as_python_writes_them() {
        // Each right side is CPython 3.11's json.dumps(json.loads(left), ensure_ascii=False).
        for (given, want) in [
            ("[1,2 , 3]", "[1, 2, 3]"),
            (
                r#"{"a":1,"b":{"c":[]},"d":{}}"#,
                r#"{"a": 1, "b": {"c": []}, "d": {}}"#,
            ),
            (r#"{"a":1,"b":2,"a":3}"#, r#"{"a": 3, "b": 2}"#),
            ("1.0", "1.0"),
            ("1e5", "100000.0"),
            ("1E400", "Infinity"),
            ("-1e400", "-Infinity"),
            ("1e16", "1e+16"),
            ("123456789012345680.0", "1.2345678901234568e+17"),
            ("0.0001", "0.0001"),
            ("0.00001", "1e-05"),
            ("1.5e-7", "1.5e-07"),
            ("1e-310", "1e-310"),
            ("9007199254740993", "9007199254740993"),
            (
                "123456789012345678901234567890",
                "123456789012345678901234567890",
            ),
            ("-0", "0"),
            ("-0.0", "-0.0"),
            ("-17", "-17"),
            ("NaN", "NaN"),
            ("[Infinity,-Infinity]", "[Infinity, -Infinity]"),
            (
                r#""\u00e9\u0007\/\ud83d\ude00\b\f""#,
                "\"é\\u0007/😀\\b\\f\"",
            ),
            ("\"\u{7f}é\"", "\"\u{7f}é\""),
            (" \n\ttrue\r ", "true"),
            ("null", "null"),
        ] {
            assert_eq!(parse(given).unwrap().dump(), want, "{given}");
        }
    }

    #[test]
    fn indented_values_are_written_as_python_writes_them() {
        let value = parse(r#"{"a":[1,{}],"b":[]}"#).unwrap();
        assert_eq!(
            value.dump_indented(2),
            "{\n  \"a\": [\n    1,\n    {}\n  ],\n  \"b\": []\n}"
        );
    }

    #[test]
    fn what_python_does_not_read_is_text() {
        for given in [
            "",
            " ",
            "22 C",
            "01",
            "1.",
            "1.e5",
            ".5",
            "1e",
            "+1",
            "[1,]",
            "[1",
            "{\"a\":1,}",
            "{a:1}",
            "{\"a\" 1}",
            "\"a\nb\"",
            "\"a",
            "\"\\x\"",
            "\"\\u12\"",
            "\"\\u+123\"",
            "nul",
            "nan",
            "-",
            "--1",
            "True",
            "'a'",
            "\u{feff}1",
            "1 2",
            "\"\\",
            "\"\\uD83Dé\\u\"",
            "{",
            "[",
            "1\u{a0}",
            "-Inf",
        ] {
            assert_eq!(parse(given), Err(NotJson::Text), "{given:?}");
        }
        assert!(matches!(parse(r#""\ud83d""#), Err(NotJson::Refused(_))));
        assert!(matches!(
            parse(r#""\ud83d\u0041""#),
            Err(NotJson::Refused(_))
        ));
        assert!(matches!(parse(&"1".repeat(4301)), Err(NotJson::Refused(_))));
        assert!(matches!(
            parse(&"[".repeat(100_000)),
            Err(NotJson::Refused(_))
        ));
        assert_eq!(parse(&"1".repeat(4300)).unwrap().dump(), "1".repeat(4300));
    }
}
