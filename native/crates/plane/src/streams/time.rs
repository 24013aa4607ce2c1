//! Moments in words.

const DAY_S: i64 = 24 * 3600;

/// Unix seconds as `2026-05-17T10:00:00.000Z`, as the API writes them.
pub fn iso(moment: f64) -> String {
    // To the microsecond first, as the API does: the number nearest to a millisecond may lie just below it.
    let millis = ((moment * 1e6).round() as i64).div_euclid(1000);
    let (seconds, millis) = (millis.div_euclid(1000), millis.rem_euclid(1000));
    let (year, month, day) = civil(seconds.div_euclid(DAY_S));
    let of_day = seconds.rem_euclid(DAY_S);
    let (hour, minute, second) = (of_day / 3600, of_day / 60 % 60, of_day % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{millis:03}Z")
}

/// Year, month and day of a day counted from 1970, in years that begin in March, so that a leap day is the last one.
fn civil(day: i64) -> (i64, i64, i64) {
    // Days since 1 March of year 0; 146 097 days are 400 years.
    let shifted = day + 719_468;
    let (era, of_era) = (shifted.div_euclid(146_097), shifted.rem_euclid(146_097));
    let year_of_era = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let march_month = (5 * of_year + 2) / 153;
    let day = of_year - (153 * march_month + 2) / 5 + 1;
    let month = if march_month < 10 { march_month + 3 } else { march_month - 9 };
    (era * 400 + year_of_era + i64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use super::iso;

    #[test]
    fn moments_read_as_in_the_api() {
        for (moment, text) in [
            (0.0, "1970-01-01T00:00:00.000Z"),
            (951_782_400.0, "2000-02-29T00:00:00.000Z"),
            (1_709_251_199.999, "2024-02-29T23:59:59.999Z"),
            (1_779_012_000.001, "2026-05-17T10:00:00.001Z"),
            (4_107_542_400.5, "2100-03-01T00:00:00.500Z"),
            (-1.5, "1969-12-31T23:59:58.500Z"),
        ] {
            assert_eq!(iso(moment), text);
        }
    }
}
