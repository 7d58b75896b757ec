package main

import (
	"fmt"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"kedge/deployments"
)

const settingsPage = "../../deployments/docs/settings.md"

// readFromEnvironment are settings that are no flag: what the mirror, and commands for people, read from the
// environment alone.
var readFromEnvironment = map[string]string{
	"KEDGE_GIT_USER":                "the user of https, with `KEDGE_GIT_TOKEN`",
	"KEDGE_GIT_TOKEN":               "the token of https",
	"KEDGE_GIT_TOKEN_FILE":          "a file that holds it, read again when it changes",
	"KEDGE_GITHUB_APP_ID":           "a GitHub App, whose tokens the mirror makes and renews",
	"KEDGE_GITHUB_APP_INSTALLATION": "its installation",
	"KEDGE_GITHUB_APP_KEY_FILE":     "a file that holds its private key",
	"KEDGE_GITHUB_API":              "the API of GitHub Enterprise (https://api.github.com)",
	"KEDGE_WEBHOOK_SECRET":          "the secret of webhooks at `/hook`; without one, none is taken",
	"KEDGE_WEBHOOK_SECRET_FILE":     "a file that holds it",
	"KEDGE_REPO":                    "the REPO of the service kedge-mirror",
	"GIT_SSL_CAINFO":                "a file of further authorities for https",
	"GIT_SSL_CERT":                  "a file of a client's certificate for https",
	"GIT_SSL_KEY":                   "a file of its key",
}

// The page of settings has one row for each flag, variable and line of agent.yaml, as the commands have them.
func TestSettings(t *testing.T) {
	rows := settingRows(t)
	page, err := os.ReadFile(settingsPage)
	if err != nil {
		t.Fatal(err)
	}
	begin, end := "| setting | of | what it does |\n| --- | --- | --- |\n", "\n\n"
	head, rest, found := strings.Cut(string(page), begin)
	_, tail, ended := strings.Cut(rest, end)
	if !found || !ended {
		t.Fatalf("%s has no table that begins with %q", settingsPage, begin)
	}
	want := head + begin + strings.Join(rows, "\n") + end + tail
	if *update {
		if err := os.WriteFile(settingsPage, []byte(want), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	if string(page) != want {
		t.Errorf("%s is not what the commands have: go test ./cmd/kedge -run TestSettings -update", settingsPage)
	}
	for _, v := range otherVariables {
		name := "KEDGE_" + strings.ToUpper(v)
		ci, _ := deployments.Page("ci")
		if !strings.Contains(want+ci, "`"+name+"`") && v != "tools" {
			t.Errorf("no page tells of %s", name)
		}
	}
}

// settingRows are the rows of the table: of all commands, of the agent, of the mirror.
func settingRows(t *testing.T) []string {
	for _, variable := range os.Environ() { // they are the defaults of flags
		if name, _, _ := strings.Cut(variable, "="); strings.HasPrefix(name, "KEDGE_") {
			t.Setenv(name, "")
			os.Unsetenv(name)
		}
	}
	root := newRoot(&app{})
	agent, mirror := commandOf(t, root, "agent"), commandOf(t, root, "mirror")
	var rows []string
	row := func(of, about string, names ...string) {
		for i := range names {
			names[i] = "`" + names[i] + "`"
		}
		about = strings.ReplaceAll(about, "|", `\|`)
		rows = append(rows, fmt.Sprintf("| %s | %s | %s |", strings.Join(names, ", "), of, about))
	}
	fields := slices.Collect(agentFields)
	root.PersistentFlags().VisitAll(func(f *pflag.Flag) {
		row("all", about(f), append([]string{"--" + f.Name}, variablesOf(t, "", f.Name)...)...)
	})
	agent.LocalNonPersistentFlags().VisitAll(func(f *pflag.Flag) {
		names := []string{"--" + f.Name}
		if field := strings.ReplaceAll(f.Name, "-", "_"); slices.Contains(fields, field) {
			names = append(names, "KEDGE_"+strings.ToUpper(field), field)
		} else {
			names = append(names, variablesOf(t, "agent", f.Name)...)
		}
		if f.Name != "help" {
			row("agent", about(f), names...)
		}
	})
	mirror.LocalNonPersistentFlags().VisitAll(func(f *pflag.Flag) {
		if f.Name != "help" {
			row("mirror", about(f), append([]string{"--" + f.Name}, variablesOf(t, "mirror", f.Name)...)...)
		}
	})
	var names []string
	for name := range readFromEnvironment {
		names = append(names, name)
	}
	slices.Sort(names)
	for _, name := range names {
		row("mirror", readFromEnvironment[name], name)
	}
	return rows
}

func commandOf(t *testing.T, root *cobra.Command, name string) *cobra.Command {
	t.Helper()
	c, _, err := root.Find([]string{name})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// about is a flag's usage and its default, if that is not in the usage.
func about(f *pflag.Flag) string {
	_, usage := pflag.UnquoteUsage(f)
	usage = regexp.MustCompile(`; also KEDGE_[A-Z_]+`).ReplaceAllString(usage, "")
	switch f.DefValue {
	case "", "false", "0s", "0", "[]":
		return usage
	}
	return usage + " (default " + strings.TrimSuffix(strings.TrimSuffix(f.DefValue, "0s"), "0m") + ")"
}

// variablesOf are the variables that a flag's default comes from: found by setting them.
func variablesOf(t *testing.T, command, flag string) (names []string) {
	const value = "a-value"
	own := "KEDGE_" + strings.ToUpper(strings.ReplaceAll(flag, "-", "_"))
	for _, name := range []string{own, "KEDGE_NODE", "CACHE_DIRECTORY"} {
		if os.Getenv(name) != "" {
			continue
		}
		os.Setenv(name, value)
		root := newRoot(&app{})
		f := root.PersistentFlags().Lookup(flag)
		if command != "" {
			f = commandOf(t, root, command).Flags().Lookup(flag)
		}
		if f.Value.String() == value {
			names = append(names, name)
		}
		os.Unsetenv(name)
	}
	return names
}

// The page of hooks tells of each variable that commands get, and of no other.
func TestHookVariables(t *testing.T) {
	t.Parallel()
	source, err := os.ReadFile("../../sync/command/environ.go")
	if err != nil {
		t.Fatal(err)
	}
	want := []string{"KEDGE_RUN"}
	for _, m := range regexp.MustCompile(`"(KEDGE_[A-Z]+)="`).FindAllStringSubmatch(string(source), -1) {
		want = append(want, m[1])
	}
	page, _ := deployments.Page("hooks")
	_, table, _ := strings.Cut(page, "### Variables")
	table, _, _ = strings.Cut(table, "\n\nCommands")
	var has []string
	for _, m := range regexp.MustCompile("`(KEDGE_[A-Z]+)`").FindAllStringSubmatch(table, -1) {
		has = append(has, m[1])
	}
	slices.Sort(want)
	slices.Sort(has)
	if !slices.Equal(has, want) {
		t.Errorf("the page has %q, commands get %q", has, want)
	}
}
