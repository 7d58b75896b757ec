package deployments

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"testing"
)

// secret has all that quoting could change.
const secret = `wJalr"XUtnFEMI'K7MDENG\bPx&RfiCY<EXAMPLE>KEY`

// No error of a manifest's quotes a value of the environment, wherever in the manifest it was put.
func TestErrorsQuoteNoVariable(t *testing.T) {
	t.Parallel()
	values := map[string]string{"PLAIN": "wJalrXUtnFEMIK7MDENGbPxRfiCYEXAMPLEKEY", "ODD": secret, "LINES": "first-half-of-it\nsecond-half-of-it"}
	env := func(name string) (string, bool) { v, ok := values[name]; return v, ok }
	base := "src: a.tar\nchecksum: " + hex64 + "\ndest: /srv/app\n"
	scalars := []string{
		"keep: %s", "name: '%s'", "version: \"%s\"", "created: %s", "owner: a %s", "dest_mode: %s", "%s: 1", "sync_strategy: x%s",
		"symlinks: |\n  %s", "symlinks: >\n\n\n  %s", "size: [%s]", "drain: %s", "immutable: %s", "shared: [../%s]", "checksum: %s",
		"commands: {env: {'%s': x}}", "commands: {pre: [{run: x, timeout: '%s'}]}", "commands: {pre: [{run: x, user: '%s !'}]}",
		"commands: {'%s': x}", "health: {every: '%s'}", "health: {checks: [{http: 'ftp://%s'}]}", "index: {url: '%s'}",
		"index: {url: 'ftp://x/%s'}", "index: {url: 'https://u:%s@h/x'}", "deltas: [{from: %s}]", "x: *%s", "x: &%s y", "x: !%s y", "%s", "[%s", "'%s", "\"%s",
		"%s: {%s: %s}", "{%s: [", "keep: 'a\n\n\n  %s'",
	}
	for name, value := range values {
		for _, action := range []string{
			"{{ must_env `%s` }}", "{{ env `%s` }}", "{{ printf `%%.30s` (env `%s`) }}", "{{ env `%s` | json_escape }}",
			"{{ printf `%%q` (env `%s`) }}", "{{ $x := env `%s` }}{{ $x }}", "{{ $x := `` }}{{ $x = env `%s` }}{{ $x }}",
			"{{ with env `%s` }}{{ . }}{{ end }}", "{{ with $x := env `%s` }}{{ print . }}{{ end }}",
			"{{ env `UNSET` (env `%s`) }}", "{{ env `%s` | env }}", "{{ must_env (env `%s`) }}",
		} {
			for _, scalar := range scalars {
				text := base + strings.ReplaceAll(scalar, "%s", fmt.Sprintf(action, name)) + "\nnonsense: 1\n"
				_, err := ParseManifest([]byte(text), manifestURL, env)
				if err == nil {
					t.Fatalf("%s: it is valid", text)
				}
				for _, part := range []string{value[:6], value[len(value)/2 : len(value)/2+6], value[len(value)-6:]} {
					if strings.Contains(err.Error(), part) {
						t.Errorf("%s:\n%v", text, err)
					}
				}
			}
		}
	}
	_, err := ParseManifest([]byte(base+"keep: {{ must_env `PLAIN` }}\n"), manifestURL, env)
	check(t, err, "manifest:4:7: this line isn't valid with this node's environment: check PLAIN, whose")
	_, err = ParseManifest([]byte(base+"{{ $x := env `UNSET` (env `PLAIN`) }}keep: {{ $x }}\n"), manifestURL, env)
	check(t, err, "manifest:4:7: this line isn't valid with this node's environment: check PLAIN, UNSET, whose")
	_, err = ParseManifest([]byte(base+"keep: {{ must_env (env `PLAIN`) }}\n"), manifestURL, env)
	check(t, err, "the environment variable that the value of PLAIN names is not set on this node")
}

func TestMask(t *testing.T) {
	t.Parallel()
	m := NewMask([]string{secret, "abc", "pass word\nand another"})
	for _, form := range []string{
		secret, fmt.Sprintf("%q", secret), fmt.Sprintf("%v", map[string]string{"a": secret}), "pass+word%0Aand+another", "and another", "pass word",
	} {
		text := m.Text("before " + form + " after")
		if strings.Contains(text, "XUtn") || strings.Contains(text, "pass") || strings.Contains(text, "another") || !strings.Contains(text, "***") {
			t.Errorf("%q is %q", form, text)
		}
	}
	if got := m.Text("abc"); got != "abc" {
		t.Errorf("a short value is %q", got)
	}
	quoted, _ := json.Marshal(secret)
	if got := m.Text(string(quoted)); strings.Contains(got, "XUtn") {
		t.Errorf("in JSON: %s", got)
	}
	var none *Mask
	if none.Text("x") != "x" || NewMask(nil).Text("x") != "x" {
		t.Error("a nil mask changes text")
	}
}

// What is masked: what goes into commands, and what is called a secret; not what is shown anyway.
func TestMaskedValues(t *testing.T) {
	t.Parallel()
	values := map[string]string{
		"ROOT": "/srv/blue", "GREETING": "good morning", "DB_PASSWORD": "hunter22", "RAILS_ENV": "production", "PORT": "8080", "SHORT": "abc",
		"SITE": "http://127.0.0.1:4000", "COMMAND_ONLY": "4711-0815-42", "VARIABLE": "in the environment", "UNUSED": "nowhere to be seen",
	}
	text := "src: a.tar\nchecksum: " + hex64 + "\ndest: '{{ must_env `ROOT` }}/app'\n" +
		"commands:\n  env: {X: '{{ env `VARIABLE` }}', API_TOKEN: written out, COLOUR: turquoise}\n" +
		"  pre:\n  - 'cd {{ env `ROOT` }} && echo {{ env `GREETING` }} " +
		"{{ env `RAILS_ENV` }} {{ env `PORT` }} {{ env `SHORT` }}'\n" +
		"health:\n  checks:\n  - http: '{{ env `SITE` }}/{{ env `DB_PASSWORD` }}'\n  - exec: 'test {{ env `COMMAND_ONLY` | printf `%q` }}'\n# {{ env `UNUSED` }}\n"
	m, err := ParseManifest([]byte(text), manifestURL, func(name string) (string, bool) { v, ok := values[name]; return v, ok })
	if err != nil {
		t.Fatal(err)
	}
	slices.Sort(m.Sensitive)
	want := []string{"4711-0815-42", "good morning", "hunter22", "in the environment", "written out"}
	if !slices.Equal(m.Sensitive, want) {
		t.Errorf("masked are %q, want %q", m.Sensitive, want)
	}
	if m, err := ParseTemplate([]byte(text), manifestURL); err != nil || len(m.Sensitive) > 0 {
		t.Errorf("of a template %v, %v", m.Sensitive, err)
	}
}
