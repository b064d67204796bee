//! The README's first command, as a new user runs it: it must end well and print what it checked.

use std::process::Command;

#[test]
fn the_demo_holds() {
    let output = Command::new(env!("CARGO_BIN_EXE_hypersync"))
        .arg("demo")
        .output()
        .expect("the demo starts");
    let (said, errors) =
        (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{said}\n{errors}");
    println!("{said}");
    let figure = |name: &str| -> u64 {
        let line = said.lines().find(|line| line.trim_start().starts_with(name));
        let line = line.unwrap_or_else(|| panic!("no line '{name}' in:\n{said}"));
        let words = line.trim_start()[name.len()..].trim_start();
        let digits: String = words
            .chars()
            .take_while(|c| c.is_ascii_digit() || *c == ',')
            .filter(|c| *c != ',')
            .collect();
        digits.parse().unwrap_or_else(|_| panic!("no figure in '{line}'"))
    };
    assert!(figure("connections") >= 100_000);
    assert!(figure("changes") >= 20_000);
    assert!(figure("checked") >= 10_000);
}

#[test]
fn bad_options_of_the_demo_exit_with_2() {
    let output = Command::new(env!("CARGO_BIN_EXE_hypersync"))
        .args(["demo", "--rate", "many"])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(2));
}
