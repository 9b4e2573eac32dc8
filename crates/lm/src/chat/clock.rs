//! Dates as `strftime` writes them, in UTC.

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
const DAYS: [&str; 7] = ["Thursday", "Friday", "Saturday", "Sunday", "Monday", "Tuesday", "Wednesday"];

/// The year, the month (1 to 12) and the day of a number of days since 1970-01-01, in the Gregorian calendar.
fn civil(days: i64) -> (i64, i64, i64) {
    // Years begin in March here, so that the leap day is their last; eras have 400 years (146,097 days).
    let shifted = days + 719_468;
    let era = shifted.div_euclid(146_097);
    let day_of_era = shifted.rem_euclid(146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    (year_of_era + era * 400 + i64::from(month <= 2), month, day)
}

/// `format` with the time filled in, or nothing for a letter that is not known.
pub(super) fn strftime(format: &str, unix_seconds: i64) -> Option<String> {
    let (days, seconds) = (unix_seconds.div_euclid(86_400), unix_seconds.rem_euclid(86_400));
    let (year, month, day) = civil(days);
    let month_name = MONTHS[(month - 1) as usize];
    let day_name = DAYS[days.rem_euclid(7) as usize];
    let (hour, minute, second) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
    let hour_of_twelve = if hour % 12 == 0 { 12 } else { hour % 12 };
    let mut out = String::new();
    let mut letters = format.chars();
    while let Some(letter) = letters.next() {
        if letter != '%' {
            out.push(letter);
            continue;
        }
        let mut letter = letters.next()?;
        let padded = letter != '-';
        if !padded {
            letter = letters.next()?;
        }
        let number = match letter {
            'd' => day,
            'm' => month,
            'y' => year.rem_euclid(100),
            'H' => hour,
            'I' => hour_of_twelve,
            'M' => minute,
            'S' => second,
            _ => {
                match letter {
                    'Y' => out.push_str(&format!("{year:04}")),
                    'B' => out.push_str(month_name),
                    'b' => out.push_str(&month_name[..3]),
                    'A' => out.push_str(day_name),
                    'a' => out.push_str(&day_name[..3]),
                    'p' => out.push_str(if hour < 12 { "AM" } else { "PM" }),
                    '%' => out.push('%'),
                    _ => return None,
                }
                continue;
            }
        };
        out.push_str(&if padded { format!("{number:02}") } else { number.to_string() });
    }
    Some(out)
}

#[cfg(test)]
mod tests {
    use super::strftime;

    #[test]
    fn dates_are_those_of_the_calendar() {
        let check = |seconds, expected: &str| {
            assert_eq!(strftime("%A %d %B %Y %H:%M:%S", seconds).unwrap(), expected);
        };
        check(0, "Thursday 01 January 1970 00:00:00");
        check(951_782_399, "Monday 28 February 2000 23:59:59");
        check(951_782_400, "Tuesday 29 February 2000 00:00:00");
        check(-1, "Wednesday 31 December 1969 23:59:59");
        check(4_107_542_400, "Monday 01 March 2100 00:00:00");
        assert_eq!(strftime("%-d %b %y %I %p %%", 1_721_984_703).unwrap(), "26 Jul 24 09 AM %");
        assert_eq!(strftime("%Q", 0), None);
        assert!(strftime("%Y", i64::MAX).is_some());
    }
}
