//! llama.cpp's grammar notation, GBNF, said in Lark's.
//!
//! In GBNF everything is a character, and a text fits if there is any way to read it. A Lark grammar has words, of which the longest is
//! taken. So that nothing is lost, each character becomes a word of its own: literals are spelled, classes are regular
//! expressions for one character.

use std::collections::HashMap;
use std::fmt::Write;
use std::iter::Peekable;
use std::str::Chars;

/// Whether a grammar is written in GBNF: only there `::=` stands.
pub(super) fn is_gbnf(text: &str) -> bool {
    text.contains("::=")
}

/// The Lark grammar for a GBNF one; or what is wrong, beginning with the line.
pub(super) fn to_lark(text: &str) -> Result<String, String> {
    let mut reader = Reader {
        chars: text.chars().peekable(),
        line: 1,
    };
    let mut lark = String::new();
    // Each name with its Lark name, the line that uses it first, and whether it has a rule.
    let mut names: HashMap<String, (String, usize, bool)> = HashMap::new();
    let mut depth = 0usize;
    while let Some(c) = reader.token() {
        let line = reader.line;
        let wrong = |what: &str| Err(format!("line {line}: {what}"));
        if lark.is_empty() && !is_name(c) {
            return wrong("expected a rule (name ::= …)");
        }
        match c {
            _ if is_name(c) => {
                let mut name = String::from(c);
                while let Some(c) = reader.chars.next_if(|c| is_name(*c)) {
                    name.push(c);
                }
                let count = names.len();
                let (short, _, defined) = names.entry(name.clone()).or_insert_with(|| {
                    let short = match name.as_str() {
                        "root" => "start".to_string(),
                        _ => format!("r{count}"),
                    };
                    (short, line, false)
                });
                if reader.defines()? {
                    if depth > 0 {
                        return wrong("a bracket is not closed");
                    }
                    if std::mem::replace(defined, true) {
                        return wrong(&format!("{name} has a rule already"));
                    }
                    let _ = write!(lark, "\n{short}: ");
                } else if lark.is_empty() {
                    return wrong("expected ::= behind the name of a rule");
                } else {
                    let _ = write!(lark, "{short} ");
                }
            }
            '"' => {
                let mut literal = String::new();
                while let Some(c) = reader.character('"')? {
                    let one = serde_json::Value::from(c.to_string());
                    let _ = write!(literal, "{one} ");
                }
                let _ = write!(lark, "({literal}) ");
            }
            '[' => {
                let mut class = String::from("[");
                if reader.chars.next_if_eq(&'^').is_some() {
                    class.push('^');
                }
                while let Some(c) = reader.character(']')? {
                    let _ = write!(class, "\\x{{{:x}}}", u32::from(c));
                    let mut ahead = reader.chars.clone();
                    if ahead.next() == Some('-') && ahead.next() != Some(']') {
                        reader.chars.next();
                        if let Some(last) = reader.character(']')? {
                            let _ = write!(class, "-\\x{{{:x}}}", u32::from(last));
                        }
                    }
                }
                let _ = write!(lark, "/{class}]/ ");
            }
            '.' => lark += "/(?s:.)/ ",
            '{' => {
                let mut bounds = String::new();
                while let Some(c) = reader.chars.next_if(|c| *c != '}') {
                    bounds.push(c);
                }
                reader.chars.next();
                let number = |n: &str| n.trim().parse::<u16>().is_ok();
                let good = match bounds.split_once(',') {
                    Some((least, most)) => {
                        number(least) && (most.trim().is_empty() || number(most))
                    }
                    None => number(&bounds),
                };
                if !good {
                    return wrong(&format!(
                        "expected {{n}}, {{n,}} or {{n,m}}, found {{{bounds}}}"
                    ));
                }
                let _ = write!(lark, "{{{bounds}}} ");
            }
            '(' | ')' | '|' | '*' | '+' | '?' => {
                match c {
                    '(' => depth += 1,
                    ')' if depth == 0 => return wrong("a bracket is closed that was not opened"),
                    ')' => depth -= 1,
                    _ => {}
                }
                let _ = write!(lark, "{c} ");
            }
            _ => return wrong(&format!("what is {c:?}?")),
        }
    }
    if depth > 0 {
        return Err(format!("line {}: a bracket is not closed", reader.line));
    }
    let mut missing: Vec<_> = names
        .iter()
        .filter(|(_, (_, _, defined))| !defined)
        .collect();
    missing.sort_by_key(|(name, (_, line, _))| (*line, name.as_str()));
    match missing.first() {
        Some((name, (_, line, _))) => Err(format!("line {line}: {name} has no rule")),
        None if !names.contains_key("root") => Err("there is no rule root".to_string()),
        None => Ok(lark),
    }
}

fn is_name(c: char) -> bool {
    c.is_ascii_alphanumeric() || c == '-' || c == '_'
}

/// A grammar's characters, with the line they stand in.
struct Reader<'a> {
    chars: Peekable<Chars<'a>>,
    line: usize,
}

impl Reader<'_> {
    /// The next character that means something: white space and comments mean nothing.
    fn token(&mut self) -> Option<char> {
        loop {
            match self.chars.next()? {
                '\n' => self.line += 1,
                '#' => while self.chars.next_if(|c| *c != '\n').is_some() {},
                c if c.is_whitespace() => {}
                c => return Some(c),
            }
        }
    }

    /// Takes `::=`, if it comes next.
    fn defines(&mut self) -> Result<bool, String> {
        while self.chars.next_if(|c| *c == ' ' || *c == '\t').is_some() {}
        if self.chars.next_if_eq(&':').is_none() {
            return Ok(false);
        }
        match (self.chars.next(), self.chars.next()) {
            (Some(':'), Some('=')) => Ok(true),
            _ => Err(format!("line {}: expected ::=", self.line)),
        }
    }

    /// The next character of a literal or a class that ends with `end`; nothing at the end.
    fn character(&mut self, end: char) -> Result<Option<char>, String> {
        let line = self.line;
        let wrong = |what: &str| Err(format!("line {line}: {what}"));
        match self.chars.next() {
            None | Some('\n') => wrong(&format!("{end} is missing")),
            Some(c) if c == end => Ok(None),
            Some('\\') => match self.chars.next() {
                Some('n') => Ok(Some('\n')),
                Some('r') => Ok(Some('\r')),
                Some('t') => Ok(Some('\t')),
                Some(c @ ('x' | 'u' | 'U')) => {
                    let digits = match c {
                        'x' => 2,
                        'u' => 4,
                        _ => 8,
                    };
                    let hex: String = self.chars.by_ref().take(digits).collect();
                    let code = u32::from_str_radix(&hex, 16).ok();
                    match code
                        .filter(|_| hex.len() == digits)
                        .and_then(char::from_u32)
                    {
                        Some(c) => Ok(Some(c)),
                        None => wrong(&format!("\\{c}{hex} is no character")),
                    }
                }
                Some(c @ ('"' | '\\' | '[' | ']' | '-' | '^')) => Ok(Some(c)),
                Some(c) => wrong(&format!("what is \\{c}?")),
                None => wrong(&format!("{end} is missing")),
            },
            Some(c) => Ok(Some(c)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_are_said_in_lark() {
        let gbnf = "# a list\nroot ::= \"a\\n\" item{1,3} |\n  (item \",\")*  # of items\nitem ::= [a-z^\\]] [^\\x41-] .?\n";
        let lark = to_lark(gbnf).unwrap();
        assert_eq!(
            lark,
            "\nstart: (\"a\" \"\\n\" ) r1 {1,3} | ( r1 (\",\" ) ) * \
             \nr1: /[\\x{61}-\\x{7a}\\x{5e}\\x{5d}]/ /[^\\x{41}\\x{2d}]/ /(?s:.)/ ? "
        );
    }

    #[test]
    fn faults_name_their_line() {
        for (gbnf, want) in [
            ("root ::= a\n", "line 1: a has no rule"),
            ("a ::= \"x\"", "there is no rule root"),
            (
                "root ::= \"x\"\n\nroot ::= \"y\"",
                "line 3: root has a rule already",
            ),
            (
                "root ::= (\"x\"\nb ::= \"y\"",
                "line 2: a bracket is not closed",
            ),
            (
                "root ::= \"x\")",
                "line 1: a bracket is closed that was not opened",
            ),
            ("root ::=\n \"x", "line 2: \" is missing"),
            ("root ::= [a-", "line 1: ] is missing"),
            ("root ::= \"\\q\"", "line 1: what is \\q?"),
            ("root ::= \"\\ud800\"", "line 1: \\ud800 is no character"),
            (
                "root ::= \"a\"{x}",
                "line 1: expected {n}, {n,} or {n,m}, found {x}",
            ),
            ("root ::= %", "line 1: what is '%'?"),
            ("::= a", "line 1: expected a rule (name ::= …)"),
            (
                "a b ::= c",
                "line 1: expected ::= behind the name of a rule",
            ),
            ("root : a ::= ", "line 1: expected ::="),
        ] {
            assert_eq!(to_lark(gbnf).unwrap_err(), want, "{gbnf}");
        }
    }
}
