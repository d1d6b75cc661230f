//! What templates find in Python: `json.dumps` and `strftime`.

use crate::chat::json::Json;
use minijinja::ErrorKind;
use minijinja::value::Kwargs;
use std::fmt::Write as _;
use std::time::{SystemTime, UNIX_EPOCH};

/// `tojson` as `transformers` has it: Python's `json.dumps(value, ensure_ascii=False, indent=…)`.
pub(super) fn to_json(
    value: &minijinja::Value,
    kwargs: Kwargs,
) -> Result<String, minijinja::Error> {
    let indent: Option<usize> = kwargs.get("indent")?;
    let _ensure_ascii: Option<bool> = kwargs.get("ensure_ascii")?; // never: the prompt is UTF-8
    kwargs.assert_all_used()?;
    let value = serde_json::to_value(value)
        .map_err(|e| minijinja::Error::new(ErrorKind::BadSerialization, "tojson").with_source(e))?;
    let json = Json::from(&value);
    Ok(match indent {
        Some(indent) => json.dump_indented(indent.min(16)),
        None => json.dump(),
    })
}

/// Seconds since 1970, UTC.
pub(super) fn now() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |d| d.as_secs())
}

/// The directives of `strftime` that templates use, in UTC; others stay as they are.
pub(super) fn strftime(format: &str, seconds: u64) -> String {
    const MONTHS: [&str; 12] = [
        "January",
        "February",
        "March",
        "April",
        "May",
        "June",
        "July",
        "August",
        "September",
        "October",
        "November",
        "December",
    ];
    const DAYS: [&str; 7] = [
        "Thursday",
        "Friday",
        "Saturday",
        "Sunday",
        "Monday",
        "Tuesday",
        "Wednesday",
    ];
    let leap = |year: u64| {
        year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400))
    };
    let (days, clock) = (seconds / 86400, seconds % 86400);
    // Plain counting from 1970: at most a few hundred steps in this millennium, bounded for a broken clock.
    let (mut year, mut day) = (1970, days.min(4_000_000));
    while day >= 365 + u64::from(leap(year)) {
        day -= 365 + u64::from(leap(year));
        year += 1;
    }
    let of_year = day + 1;
    let mut month = 0;
    for length in [
        31,
        28 + u64::from(leap(year)),
        31,
        30,
        31,
        30,
        31,
        31,
        30,
        31,
        30,
    ] {
        if day < length {
            break;
        }
        day -= length;
        month += 1;
    }
    let (hour, minute, second) = (clock / 3600, clock / 60 % 60, clock % 60);
    let weekday = DAYS[(days % 7) as usize];
    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        // Writing into a String cannot fail.
        let _ = match chars.next() {
            Some('Y') => write!(out, "{year}"),
            Some('y') => write!(out, "{:02}", year % 100),
            Some('m') => write!(out, "{:02}", month + 1),
            Some('d') => write!(out, "{:02}", day + 1),
            Some('j') => write!(out, "{of_year:03}"),
            Some('H') => write!(out, "{hour:02}"),
            Some('I') => write!(out, "{:02}", (hour + 11) % 12 + 1),
            Some('p') => write!(out, "{}", if hour < 12 { "AM" } else { "PM" }),
            Some('M') => write!(out, "{minute:02}"),
            Some('S') => write!(out, "{second:02}"),
            Some('B') => write!(out, "{}", MONTHS[month]),
            Some('b') => write!(out, "{}", &MONTHS[month][..3]),
            Some('A') => write!(out, "{weekday}"),
            Some('a') => write!(out, "{}", &weekday[..3]),
            Some('%') => write!(out, "%"),
            Some(other) => write!(out, "%{other}"),
            None => write!(out, "%"),
        };
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_written_as_strftime_writes_them() {
        // date -u -d @951827696: Tue Feb 29 12:34:56 UTC 2000
        assert_eq!(
            strftime(
                "%a %A %b %B %d %m %Y %y %j %H:%M:%S %I%p %% %q",
                951_827_696
            ),
            "Tue Tuesday Feb February 29 02 2000 00 060 12:34:56 12PM % %q"
        );
        assert_eq!(strftime("%d %b %Y", 1_798_761_599), "31 Dec 2026");
        assert_eq!(strftime("%Y-%m-%d", 0), "1970-01-01");
        strftime("%Y%", u64::MAX);
    }
}
