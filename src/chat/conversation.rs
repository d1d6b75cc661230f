//! What was said, and the part of it that the model is given.

use super::message::{Message, Role};
use super::template::Template;
use super::tokenizer::Tokenizer;
use crate::error::{Error, Result};
use serde_json::Value;

/// A conversation. A turn is what begins with a message of the user's (or several in a row) and goes to the next.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Conversation {
    /// The system text, if any.
    pub system: Option<String>,
    /// Everything that was said, without the system text.
    pub messages: Vec<Message>,
    /// The messages before this one are left out of prompts: the context was full.
    pub from: usize,
}

impl Conversation {
    /// An empty conversation.
    pub fn new(system: Option<String>) -> Conversation {
        Conversation {
            system,
            ..Conversation::default()
        }
    }

    /// Where turns begin, oldest first.
    fn turns(&self) -> impl DoubleEndedIterator<Item = usize> {
        let user = |i: usize| self.messages[i].role == Role::User;
        (0..self.messages.len()).filter(move |&i| i == 0 || (user(i) && !user(i - 1)))
    }

    /// How many turns there are.
    pub fn len(&self) -> usize {
        self.turns().count()
    }

    /// Whether nothing was said yet.
    pub fn is_empty(&self) -> bool {
        self.messages.is_empty()
    }

    /// Turns that prompts leave out.
    pub fn left_out(&self) -> usize {
        self.turns().filter(|&i| i < self.from).count()
    }

    /// Leaves out the messages before `from`, if a turn begins there.
    pub fn leave_out(&mut self, from: usize) {
        let there = self.turns().any(|i| i == from);
        self.from = if there { from } else { 0 };
    }

    /// The model's last text.
    pub fn last_answer(&self) -> Option<&str> {
        let answers = |m: &&Message| m.role == Role::Assistant && !m.content.is_empty();
        Some(&self.messages.iter().rfind(answers)?.content)
    }

    /// The text that the last turn began with.
    pub fn last_question(&self) -> Option<&str> {
        Some(&self.messages[self.turns().next_back()?].content)
    }

    /// Takes the last turn back; gives its messages.
    pub fn take_back(&mut self) -> Option<Vec<Message>> {
        let start = self.turns().next_back()?;
        let turn = self.messages.split_off(start);
        if self.from >= self.messages.len() {
            self.from = 0; // What was left out may fit again.
        }
        Some(turn)
    }

    /// The prompt for the next message of the model, which begins with the tokens `begun`.
    ///
    /// If it leaves no room in a context of `limit` tokens, whole oldest turns are left out, now and from here on: as many
    /// as free a quarter of the context, so that it is not full again at once. The last turn always stays.
    ///
    /// # Errors
    /// [`Error::ContextFull`] if the last turn alone does not fit; see [`Template::encode`] for the others. Nothing has changed then.
    pub fn prompt(
        &mut self,
        template: &Template,
        tokenizer: &Tokenizer,
        tools: Option<&[Value]>,
        begun: &[u32],
        limit: usize,
    ) -> Result<Vec<u32>> {
        let prompt = |from: usize| -> Result<Vec<u32>> {
            let system = self.system.iter().map(|s| Message::new(Role::System, s));
            let messages: Vec<_> = system
                .chain(self.messages[from..].iter().cloned())
                .collect();
            let mut ids = template.encode(tokenizer, &messages, tools)?;
            ids.extend(begun);
            Ok(ids)
        };
        let whole = prompt(self.from)?;
        if whole.len() < limit {
            return Ok(whole);
        }
        // Fewer turns are shorter, so the place can be found by halving.
        let later: Vec<usize> = self.turns().filter(|&i| i > self.from).collect();
        let (mut low, mut high) = (0, later.len());
        while low + 1 < high {
            let middle = (low + high) / 2;
            match prompt(later[middle - 1])?.len() > limit - limit / 4 {
                true => low = middle,
                false => high = middle,
            }
        }
        let full = |want| Error::ContextFull { limit, want };
        let Some(&from) = later.get(high.wrapping_sub(1)) else {
            return Err(full(whole.len() + 1));
        };
        let rest = prompt(from)?;
        if rest.len() >= limit {
            return Err(full(rest.len() + 1));
        }
        self.from = from;
        Ok(rest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tokenizer(name: &str) -> Option<Tokenizer> {
        crate::chat::vocabulary(name).map(|path| Tokenizer::from_path(&path).unwrap())
    }

    /// A conversation of `n` turns; the last has no answer yet.
    fn conversation(n: usize) -> Conversation {
        let mut c = Conversation::new(Some("Be brief.".into()));
        for i in 0..n {
            let question = format!("Question {i} about this and that");
            c.messages.push(Message::new(Role::User, question));
            let answer = format!("Answer {i}, which is not long");
            c.messages.push(Message::new(Role::Assistant, answer));
        }
        c.messages.pop();
        c
    }

    #[test]
    fn a_full_context_loses_its_oldest_turns_and_no_more() {
        for name in [
            "mixtral-8x7b.tokenizer.model",
            "mixtral-8x22b-instruct.tokenizer.model",
        ] {
            let Some(tok) = tokenizer(name) else { continue };
            let template = Template::choose(&tok, None).unwrap();
            let all = conversation(12)
                .prompt(&template, &tok, None, &[], 10_000)
                .unwrap();
            for begun in [&[][..], &[7, 8, 9]] {
                for limit in 1..=all.len() + 5 {
                    let mut c = conversation(12);
                    let got = c.prompt(&template, &tok, None, begun, limit);
                    let length = |from: usize| {
                        let mut c = Conversation {
                            from,
                            ..conversation(12)
                        };
                        c.prompt(&template, &tok, None, begun, 10_000)
                            .unwrap()
                            .len()
                    };
                    let Ok(ids) = got else {
                        assert!(length(22) >= limit, "{limit}");
                        assert_eq!(c, conversation(12));
                        continue;
                    };
                    assert!(ids.len() < limit && ids.len() == length(c.from));
                    assert!(ids.ends_with(begun) && c.from.is_multiple_of(2));
                    if length(0) < limit {
                        assert_eq!(c.from, 0);
                    } else {
                        let room = limit - limit / 4;
                        // The last turn may take more than three quarters; nothing else may.
                        assert!(ids.len() <= room || c.from == 22, "{limit}");
                        assert!(c.from == 2 || length(c.from - 2) > room, "{limit}");
                    }
                }
            }
        }
    }

    #[test]
    fn turns_are_taken_back_whole() {
        let mut c = conversation(3);
        let mut call = Message::new(Role::Assistant, "");
        call.tool_calls.push(super::super::message::ToolCall {
            id: "abcdefgh1".into(),
            name: "f".into(),
            arguments: "{}".into(),
        });
        c.messages.push(call);
        c.messages.push(Message::new(Role::Tool, "3"));
        c.messages.push(Message::new(Role::Assistant, "three"));
        c.from = 4;
        assert_eq!((c.len(), c.left_out()), (3, 2));
        assert_eq!(c.last_answer(), Some("three"));
        assert_eq!(c.take_back().unwrap().len(), 4);
        assert_eq!((c.len(), c.from), (2, 0));
        assert_eq!(c.last_answer(), Some("Answer 1, which is not long"));
        assert_eq!(c.last_question(), Some("Question 1 about this and that"));
        assert_eq!(c.take_back().unwrap().len(), 2);
        assert_eq!(c.take_back().unwrap().len(), 2);
        assert_eq!((c.take_back(), c.is_empty()), (None, true));
    }
}
