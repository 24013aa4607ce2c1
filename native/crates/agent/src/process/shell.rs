//! Shell lines, at the price of what they need.
//!
//! `bash -lc` reads several files and starts `id` before it comes to the command; in gVisor that takes three times as
//! long as the shell alone, which in turn takes twice as long as the command. So the login files are read once per user
//! (see [`super::login`]), and a line that is nothing but words is started without any shell.

use std::collections::BTreeMap;

/// Words bash treats itself. `echo`, `true` and `false` are missing: with plain words the programs do the same.
const BASH_OWN: &str = "\
    . : [ [[ alias bg bind break builtin caller case cd command compgen complete compopt continue coproc declare dirs \
    disown do done elif else enable esac eval exec exit export fc fg fi for function getopts hash help history if in jobs \
    kill let local logout mapfile popd printf pushd pwd read readarray readonly return select set shift shopt source suspend \
    test then time times trap type typeset ulimit umask unalias unset until wait while \
";

/// The words of a line in which no character means anything to a shell and whose first word is a program.
pub fn plain_words(line: &str) -> Option<Vec<&str>> {
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"_@%+:,./- \t=".contains(&byte);
    if !line.bytes().all(is_plain) {
        return None;
    }
    let words: Vec<&str> = line.split_ascii_whitespace().collect();
    let program = words.first()?;
    // "A=1 command" sets a variable; "%1" resumes a job.
    if program.contains('=') || program.starts_with('%') || is_bash_own(program) {
        return None;
    }
    if *program == "echo" && words.get(1).is_some_and(|option| option.starts_with("--")) {
        return None;
    }
    Some(words)
}

/// A prefix, on the same line, that exports `variables`. What no shell could name is left out.
pub fn exports(variables: &BTreeMap<&str, &str>) -> String {
    let is_name = |name: &str| {
        name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_')
            && !name.starts_with(|first: char| first.is_ascii_digit())
    };
    let named = variables.iter().filter(|(name, _)| is_name(name));
    let words: Vec<String> = named.map(|(name, value)| format!("{name}='{}'", value.replace('\'', r"'\''"))).collect();
    if words.is_empty() { String::new() } else { format!("export {}; ", words.join(" ")) }
}

fn is_bash_own(word: &str) -> bool {
    BASH_OWN.split_ascii_whitespace().any(|own| own == word)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_mere_words_need_no_shell() {
        assert_eq!(plain_words("python3 -m http.server 8000"), Some(vec!["python3", "-m", "http.server", "8000"]));
        assert_eq!(plain_words("  /bin/ls\t-la /workspace "), Some(vec!["/bin/ls", "-la", "/workspace"]));
        assert_eq!(plain_words("echo -n hello"), Some(vec!["echo", "-n", "hello"]));
    }

    #[test]
    fn exported_values_are_quoted() {
        assert_eq!(exports(&BTreeMap::new()), "");
        let variables = BTreeMap::from([("A", "it's $x"), ("B", ""), ("0", "no"), ("x.y", "no")]);
        assert_eq!(exports(&variables), r"export A='it'\''s $x' B=''; ");
    }

    #[test]
    fn everything_a_shell_would_interpret_is_left_to_it() {
        let lines = [
            "",
            "  ",
            "a;b",
            "a b|c",
            "a >f",
            "a $X",
            "a `b`",
            "a 'b'",
            "a \"b\"",
            "a\\b",
            "a *",
            "a ?",
            "a [b]",
            "a {b}",
            "~/x",
            "a ~",
            "#x",
            "a & b",
            "a\nb",
            "!x",
            "a (b)",
            "A=1 b",
            "cd /",
            "exit 7",
            "pwd",
            "test -e x",
            "umask",
            "time a",
            "if",
            "echo --help",
            "%1",
            "caf\u{e9}",
            "a ^b",
            "unset PATH",
            "export A=1",
        ];
        for line in lines {
            assert_eq!(plain_words(line), None, "{line:?}");
        }
    }
}
