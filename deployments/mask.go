package deployments

import (
	"encoding/json"
	"fmt"
	"maps"
	"net/url"
	"slices"
	"strconv"
	"strings"
)

// minMasked is the least length, in bytes, of a value that is masked: shorter values occur everywhere.
const minMasked = 4

// maskText replaces a masked value.
const maskText = "***"

// Mask hides the values of variables and secrets that manifests use, in logs, status, journals and errors. A nil Mask
// and the zero Mask hide nothing.
type Mask struct{ replacer *strings.Replacer }

// NewMask returns a Mask that hides the values as they are, quoted, escaped for JSON or a URL, and
// line by line. A value or line of less than 4 bytes isn't hidden. NewMask returns nil if nothing is
// to be hidden.
func NewMask(values []string) *Mask {
	var forms []string
	add := func(s string) {
		if len(s) >= minMasked && !slices.Contains(forms, s) {
			forms = append(forms, s)
		}
	}
	for _, v := range values {
		add(v)
		quoted := strconv.Quote(v)
		add(quoted[1 : len(quoted)-1])
		if text, err := json.Marshal(v); err == nil {
			add(string(text[1 : len(text)-1]))
		}
		add(url.QueryEscape(v))
		add(url.PathEscape(v))
		for line := range strings.Lines(v) {
			add(strings.TrimSpace(line))
		}
	}
	if len(forms) == 0 {
		return nil
	}
	// Of two forms that begin alike, the longer one must be replaced first, or its end would stay visible.
	slices.SortFunc(forms, func(a, b string) int { return len(b) - len(a) })
	pairs := make([]string, 0, 2*len(forms))
	for _, f := range forms {
		pairs = append(pairs, f, maskText)
	}
	return &Mask{strings.NewReplacer(pairs...)}
}

// Text returns s with *** in place of the values.
func (m *Mask) Text(s string) string {
	if m == nil || m.replacer == nil {
		return s
	}
	return m.replacer.Replace(s)
}

// maskedValues returns the values that a Mask has to hide for the manifest m. Variables whose names say that they are
// secret have such values, and those of commands.env too. So do variables that go into commands, unless dest, src or
// the like show the value anyway. Short values and common words aren't masked.
func maskedValues(values []variableValue, m *Manifest) []string {
	var shown, run strings.Builder
	fmt.Fprintln(&shown, m.Name, m.Version, m.Src, m.Dest, m.Owner, strings.Join(m.Shared, " "))
	for _, list := range [][]Command{m.Commands.Pre, m.Commands.Post, m.Commands.Success, m.Commands.Failure} {
		for _, c := range list {
			fmt.Fprintln(&run, c.Run)
		}
	}
	for _, c := range m.Health.Checks {
		fmt.Fprintln(&run, c.Exec)
	}
	values = slices.Clone(values)
	for _, name := range slices.Sorted(maps.Keys(m.Commands.Env)) {
		value := m.Commands.Env[name]
		fmt.Fprintln(&run, value)
		if SecretName(name) {
			values = append(values, variableValue{name: name, value: value})
		}
	}
	var masked []string
	for _, v := range values {
		value := strings.TrimSpace(v.value)
		if len(value) < minMasked || wellKnown(value) || slices.Contains(masked, value) {
			continue
		}
		quoted := strconv.Quote(value)
		inCommands := strings.Contains(run.String(), value) || strings.Contains(run.String(), quoted[1:len(quoted)-1])
		if SecretName(v.name) || inCommands && !strings.Contains(shown.String(), value) {
			masked = append(masked, value)
		}
	}
	return masked
}

// wellKnown reports whether a value is a common word or a short number, and so no secret.
func wellKnown(value string) bool {
	if len(value) < 8 && strings.Trim(value, "0123456789.") == "" {
		return true
	}
	switch strings.ToLower(value) {
	case "true", "false", "null", "none", "auto", "default", "enabled", "disabled", "info", "debug", "warn", "error",
		"test", "local", "development", "staging", "production", "prod", "root", "localhost", "127.0.0.1",
		"/bin", "/usr", "/var", "/tmp", "/srv", "/home", "/root", "/bin/sh", "/bin/bash":
		return true
	}
	return false
}

// SecretName reports whether a variable's name says that its value is secret.
func SecretName(name string) bool {
	name = strings.ToUpper(name)
	for _, part := range []string{
		"TOKEN", "SECRET", "PASSWORD", "PASSWD", "PASSPHRASE", "CREDENTIAL", "PRIVATE", "APIKEY", "ACCESS_KEY", "AUTHORIZATION",
	} {
		if strings.Contains(name, part) {
			return true
		}
	}
	for _, end := range []string{"_KEY", "_PASS", "_PWD", "_AUTH", "_DSN", "_PW"} {
		if strings.HasSuffix(name, end) {
			return true
		}
	}
	return false
}
