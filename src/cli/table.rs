//! Tables of settings and figures, printed row by row: for people, as Markdown or as comma-separated values.

/// How a table looks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// Aligned columns.
    Plain,
    /// Aligned columns between bars.
    Markdown,
    /// Comma-separated values.
    Csv,
}

/// A table whose settings are known before its figures are.
pub struct Table {
    form: Form,
    /// Width of every column; `None` for one that is left out.
    widths: Vec<Option<usize>>,
    /// What stands above the rows.
    head: String,
}

/// Width of a figure.
const FIGURE: usize = 10;

impl Table {
    /// A table of rows with these settings, then figures. For people, settings that are the same in all rows
    /// stand above the table instead.
    pub fn new(form: Form, settings: &[&str], rows: &[Vec<String>], figures: &[&str]) -> Table {
        let mut table = Table {
            form,
            widths: Vec::new(),
            head: String::new(),
        };
        let mut same = Vec::new();
        for (i, title) in settings.iter().enumerate() {
            let mut cells = rows.iter().map(|row| &row[i]);
            let first = cells.next().map_or("", String::as_str);
            if form != Form::Csv && cells.all(|cell| cell == first) {
                same.push(format!("{title} {first}"));
                table.widths.push(None);
            } else {
                let cells = rows.iter().map(|row| row[i].chars().count());
                table.widths.push(cells.chain([title.len()]).max());
            }
        }
        let wide = figures.iter().map(|title| title.len().max(FIGURE));
        table.widths.extend(wide.map(Some));
        if !same.is_empty() {
            table.head = format!("{}\n\n", same.join(", "));
        }
        let titles = settings.iter().chain(figures);
        let titles = table.row(titles.map(|t| t.to_string()).collect());
        table.head.push_str(&titles);
        if form == Form::Markdown {
            let rule = "---|".repeat(table.widths.iter().flatten().count());
            table.head += &format!("|{rule}\n");
        }
        table
    }

    /// What stands above the rows.
    pub fn head(&self) -> &str {
        &self.head
    }

    /// A row: settings, then figures.
    pub fn row(&self, cells: Vec<String>) -> String {
        let cells = cells.iter().zip(&self.widths);
        let cells = cells.filter_map(|(cell, wide)| wide.map(|wide| (cell, wide)));
        match self.form {
            Form::Plain => {
                let cells: Vec<_> = cells.map(|(c, wide)| format!("{c:>wide$}")).collect();
                format!("{}\n", cells.join("  "))
            }
            Form::Markdown => {
                let cells: String = cells.map(|(c, wide)| format!(" {c:>wide$} |")).collect();
                format!("|{cells}\n")
            }
            Form::Csv => {
                let quoted = |c: &str| match c.contains([',', '"', '\n']) {
                    true => format!("\"{}\"", c.replace('"', "\"\"")),
                    false => c.to_string(),
                };
                let cells: Vec<_> = cells.map(|(c, _)| quoted(c)).collect();
                format!("{}\n", cells.join(","))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(form: Form) -> String {
        let rows = ["a", "b,c"].map(|name| vec![name.to_string(), "2".to_string()]);
        let table = Table::new(form, &["model", "threads"], &rows, &["tok/s"]);
        let mut text = table.head().to_string();
        for (row, figure) in rows.into_iter().zip(["1.0", "12.5"]) {
            text += &table.row([row, vec![figure.to_string()]].concat());
        }
        text
    }

    #[test]
    fn three_forms() {
        let plain = "threads 2\n\nmodel       tok/s\n    a         1.0\n  b,c        12.5\n";
        assert_eq!(table(Form::Plain), plain);
        let markdown = "threads 2\n\n| model |      tok/s |\n|---|---|\n|     a |        1.0 |\n|   b,c |       12.5 |\n";
        assert_eq!(table(Form::Markdown), markdown);
        let csv = "model,threads,tok/s\na,2,1.0\n\"b,c\",2,12.5\n";
        assert_eq!(table(Form::Csv), csv);
    }
}
