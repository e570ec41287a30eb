//! When to sync: crontab's five fields in a named time zone, with Vixie cron's meaning.
//!
//! Operators write five fields and mean crontab's rules, so these hold, each with a test: weekday 0 and 7 are both
//! Sunday; a day of month and a weekday together mean either, unless one of the two begins with `*`; a fixed time
//! that a spring change removes runs at the change; a fixed time that an autumn change repeats runs once; a wildcard
//! time runs whenever the clock shows it. Six fields (seconds first, as some libraries want) are refused with a hint.
//! `@every 30s` (s, m, h) runs at that distance, for tests and demonstrations that cannot wait for a minute to end.

use chrono::{DateTime, Utc};
use chrono_tz::Tz;
use croner::Cron;
use croner::parser::{CronParser, Seconds, Year};

/// A crontab line's time part in a time zone, or a distance.
#[derive(Debug, Clone)]
pub struct Schedule {
    times: Times,
    zone: Tz,
}

#[derive(Debug, Clone)]
enum Times {
    Cron(Box<Cron>),
    Every(chrono::Duration),
}

/// Why a schedule was refused.
#[derive(Debug, thiserror::Error)]
pub enum ScheduleError {
    /// Not five fields.
    #[error(
        "`{text}` has {fields} fields, crontab has five fields: minute hour day-of-month month day-of-week{}",
        if *fields == 6 { "; leave out the seconds" } else { "" }
    )]
    Fields {
        /// What was written.
        text: String,
        /// How many fields it has.
        fields: usize,
    },
    /// A field that does not parse.
    #[error(
        "`{text}`: {}; the fields are minute hour day-of-month month day-of-week",
        culprit(text).unwrap_or_else(|| source.to_string())
    )]
    Field {
        /// What was written.
        text: String,
        /// What is wrong with it.
        source: croner::errors::CronError,
    },
    /// A distance that is none.
    #[error("`{0}`: write @every and a whole number of seconds, minutes or hours above 0, such as @every 30s")]
    Every(String),
    /// A time that does not exist, such as 31 February.
    #[error("`{text}` never occurs")]
    Never {
        /// What was written.
        text: String,
    },
    /// A time zone that does not exist.
    #[error("`{0}` is no IANA time zone such as UTC or Europe/Berlin")]
    Zone(String),
}

impl Schedule {
    /// Reads five crontab fields, a nickname such as `@hourly`, or `@every 30s`, and an IANA time zone.
    ///
    /// # Errors
    /// [`ScheduleError`], with what was written.
    pub fn parse(text: &str, zone: &str) -> Result<Self, ScheduleError> {
        let fields: Vec<&str> = text.split_whitespace().collect();
        if let ["@every", distance] = fields[..] {
            let zone: Tz = zone.parse().map_err(|_| ScheduleError::Zone(zone.into()))?;
            let distance = every(distance).ok_or_else(|| ScheduleError::Every(text.into()))?;
            return Ok(Self { times: Times::Every(distance), zone });
        }
        let nickname = fields.len() == 1 && fields[0].starts_with('@');
        if fields.len() != 5 && !nickname {
            return Err(ScheduleError::Fields { text: text.into(), fields: fields.len() });
        }
        let zone: Tz = zone.parse().map_err(|_| ScheduleError::Zone(zone.into()))?;
        // Vixie cron ORs day of month and weekday only when neither begins with a star; croner ORs `*/2` too.
        let stepped_star = |field: &str| field.starts_with('*') && field != "*";
        let both = !nickname && (stepped_star(fields[2]) || stepped_star(fields[4]));
        let parser =
            CronParser::builder().seconds(Seconds::Disallowed).year(Year::Disallowed).dom_and_dow(both).build();
        let cron = parser.parse(text).map_err(|source| ScheduleError::Field { text: text.into(), source })?;
        let schedule = Self { times: Times::Cron(Box::new(cron)), zone };
        match schedule.next_after(DateTime::UNIX_EPOCH + chrono::Duration::days(20_000)) {
            Some(_) => Ok(schedule),
            None => Err(ScheduleError::Never { text: text.into() }),
        }
    }

    /// The first time after `time` (exclusive). `None` when there is none within what the calendar holds.
    pub fn next_after(&self, time: DateTime<Utc>) -> Option<DateTime<Utc>> {
        match &self.times {
            Times::Every(distance) => time.checked_add_signed(*distance),
            Times::Cron(cron) => {
                let local = time.with_timezone(&self.zone);
                cron.find_next_occurrence(&local, false).ok().map(|next| next.with_timezone(&Utc))
            }
        }
    }
}

/// The first field that does not parse by itself, with its range.
fn culprit(text: &str) -> Option<String> {
    let known = [
        ("minute", "0 to 59"),
        ("hour", "0 to 23"),
        ("day-of-month", "1 to 31"),
        ("month", "1 to 12"),
        ("day-of-week", "0 to 7"),
    ];
    let parser = CronParser::builder().seconds(Seconds::Disallowed).year(Year::Disallowed).build();
    for (place, (field, (name, range))) in text.split_whitespace().zip(known).enumerate() {
        let mut alone = ["*"; 5];
        alone[place] = field;
        if parser.parse(&alone.join(" ")).is_err() {
            return Some(format!("{name} `{field}` is none: {range}, or *, lists, ranges and steps of these"));
        }
    }
    None
}

/// `30s`, `5m` or `2h`; at most a year.
fn every(distance: &str) -> Option<chrono::Duration> {
    let unit = distance.chars().last()?;
    let number: i64 = distance.strip_suffix(unit)?.parse().ok()?;
    let seconds = match unit {
        's' => 1,
        'm' => 60,
        'h' => 3600,
        _ => return None,
    };
    let distance = number.checked_mul(seconds).filter(|s| (1..=366 * 86_400).contains(s))?;
    Some(chrono::Duration::seconds(distance))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The first `count` occurrences after `start` as RFC 3339 in the schedule's zone.
    fn runs(text: &str, zone: &str, start: &str, count: usize) -> Vec<String> {
        let schedule = Schedule::parse(text, zone).unwrap();
        let mut time: DateTime<Utc> = start.parse().unwrap();
        (0..count)
            .map(|_| {
                time = schedule.next_after(time).unwrap();
                time.with_timezone(&schedule.zone).format("%a %Y-%m-%dT%H:%M:%S%:z").to_string()
            })
            .collect()
    }

    #[test]
    fn five_fields_mean_minutes_first_and_seconds_are_zero() {
        assert_eq!(
            runs("*/10 * * * *", "UTC", "2026-11-20T11:58:31Z", 2),
            ["Fri 2026-11-20T12:00:00+00:00", "Fri 2026-11-20T12:10:00+00:00"]
        );
    }

    #[test]
    fn an_occurrence_is_strictly_after_the_time_asked_about() {
        assert_eq!(runs("0 12 * * *", "UTC", "2026-11-20T12:00:00Z", 1), ["Sat 2026-11-21T12:00:00+00:00"]);
    }

    #[test]
    fn a_distance_runs_again_and_again() {
        assert_eq!(
            runs("@every 90s", "UTC", "2026-11-20T11:59:31Z", 2),
            ["Fri 2026-11-20T12:01:01+00:00", "Fri 2026-11-20T12:02:31+00:00"]
        );
        for bad in ["@every 0s", "@every -5s", "@every 5", "@every s", "@every 5d", "@every 9999999999999h"] {
            let error = Schedule::parse(bad, "UTC").unwrap_err().to_string();
            assert!(error.contains("@every 30s"), "{bad}: {error}");
        }
    }

    #[test]
    fn six_fields_are_refused_with_a_hint() {
        let error = Schedule::parse("0 */10 * * * *", "UTC").unwrap_err().to_string();
        assert!(error.contains("has 6 fields") && error.contains("leave out the seconds"), "{error}");
        assert!(Schedule::parse("* * * *", "UTC").unwrap_err().to_string().contains("has 4 fields"));
        assert!(Schedule::parse("", "UTC").is_err());
    }

    #[test]
    fn weekday_0_and_7_are_sunday_and_1_is_monday() {
        for sunday in ["0", "7", "SUN", "sun"] {
            let at = runs(&format!("0 0 * * {sunday}"), "UTC", "2026-11-20T00:00:00Z", 1);
            assert_eq!(at, ["Sun 2026-11-22T00:00:00+00:00"], "{sunday}");
        }
        assert_eq!(runs("0 0 * * 1", "UTC", "2026-11-20T00:00:00Z", 1), ["Mon 2026-11-23T00:00:00+00:00"]);
        assert_eq!(
            runs("0 0 * * 5-7", "UTC", "2026-11-20T00:00:00Z", 3),
            ["Sat 2026-11-21T00:00:00+00:00", "Sun 2026-11-22T00:00:00+00:00", "Fri 2026-11-27T00:00:00+00:00"]
        );
    }

    #[test]
    fn day_of_month_and_weekday_together_mean_either() {
        assert_eq!(
            runs("0 0 13 * 5", "UTC", "2026-11-30T00:00:00Z", 4),
            [
                "Fri 2026-12-04T00:00:00+00:00",
                "Fri 2026-12-11T00:00:00+00:00",
                "Sun 2026-12-13T00:00:00+00:00",
                "Fri 2026-12-18T00:00:00+00:00"
            ]
        );
    }

    #[test]
    fn a_day_field_that_begins_with_a_star_means_both() {
        // Every odd day that is a Monday, as Vixie cron reads it.
        assert_eq!(
            runs("0 0 */2 * 1", "UTC", "2026-11-20T00:00:00Z", 2),
            ["Mon 2026-11-23T00:00:00+00:00", "Mon 2026-12-07T00:00:00+00:00"]
        );
    }

    #[test]
    fn a_fixed_time_that_spring_removes_runs_at_the_change() {
        // Europe/Berlin goes from 02:00 to 03:00 on 2027-03-28.
        assert_eq!(
            runs("30 2 * * *", "Europe/Berlin", "2027-03-27T12:00:00Z", 2),
            ["Sun 2027-03-28T03:00:00+02:00", "Mon 2027-03-29T02:30:00+02:00"]
        );
    }

    #[test]
    fn a_fixed_time_that_autumn_repeats_runs_once() {
        // Europe/Berlin goes from 03:00 back to 02:00 on 2026-10-25.
        assert_eq!(
            runs("30 2 * * *", "Europe/Berlin", "2026-10-24T12:00:00Z", 2),
            ["Sun 2026-10-25T02:30:00+02:00", "Mon 2026-10-26T02:30:00+01:00"]
        );
    }

    #[test]
    fn a_wildcard_time_runs_through_both_changes() {
        assert_eq!(
            runs("*/30 * * * *", "Europe/Berlin", "2026-10-25T00:15:00Z", 4),
            [
                "Sun 2026-10-25T02:30:00+02:00",
                "Sun 2026-10-25T02:00:00+01:00",
                "Sun 2026-10-25T02:30:00+01:00",
                "Sun 2026-10-25T03:00:00+01:00"
            ]
        );
        assert_eq!(
            runs("*/30 * * * *", "Europe/Berlin", "2027-03-28T00:15:00Z", 2),
            ["Sun 2027-03-28T01:30:00+01:00", "Sun 2027-03-28T03:00:00+02:00"]
        );
    }

    #[test]
    fn a_time_that_never_comes_is_refused() {
        let error = Schedule::parse("0 0 31 2 *", "UTC").unwrap_err().to_string();
        assert!(error.contains("never occurs"), "{error}");
        assert_eq!(runs("0 0 29 2 *", "UTC", "2026-11-20T00:00:00Z", 1), ["Tue 2028-02-29T00:00:00+00:00"]);
    }

    #[test]
    fn an_unknown_zone_and_a_value_out_of_range_are_refused() {
        assert!(Schedule::parse("* * * * *", "Berlin").unwrap_err().to_string().contains("`Berlin`"));
        let error = Schedule::parse("60 * * * *", "UTC").unwrap_err().to_string();
        assert!(error.contains("minute `60` is none: 0 to 59"), "{error}");
        assert!(Schedule::parse("0 0 * * 8", "UTC").is_err());
    }

    #[test]
    fn nicknames_are_crontabs() {
        assert_eq!(runs("@daily", "UTC", "2026-11-20T11:00:00Z", 1), ["Sat 2026-11-21T00:00:00+00:00"]);
    }
}
