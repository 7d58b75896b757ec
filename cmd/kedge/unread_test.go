package main

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"kedge/kv"
	"kedge/sync/fleet"
)

// A role with more pins than are read is shown without them, with exit code 1, and the prefix in one line.
func TestPartThatHoldsTooMuchIsNamed(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	write := func(key, value string) {
		path := filepath.Join(dir, filepath.FromSlash(key))
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(value), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	write("desired/prod/web/app", "s3://b/app/1/manifest.yaml@sha256:"+strings.Repeat("0", 64)+"\n")
	const size = 500 << 10
	for i := range kv.MaxRoleList/size + 1 {
		write(fmt.Sprintf("pins/prod/web/junk-%d", i), strings.Repeat("x", size))
	}
	const prefix = "pins/prod/web/"
	for _, args := range [][]string{{"status", "prod/web"}, {"status", "prod/web", "--json"}} {
		stdout, stderr, code := cli(t, "", append(args, "--kv=file://"+dir)...)
		if code != exitFailed || !strings.Contains(stdout, "prod/web/app") || !strings.Contains(stdout, prefix) {
			t.Errorf("%s: exit code %d\n%s\n%s", args, code, stdout, stderr)
		}
		if !strings.Contains(stderr, "more is stored than can be read below "+prefix) ||
			!strings.Contains(stderr, "remove the keys that don't belong there") {
			t.Errorf("%s: %s", args, stderr)
		}
		if len(args) == 3 {
			var f fleet.Fleet
			if err := json.Unmarshal([]byte(stdout), &f); err != nil || f.Errors[prefix] == "" {
				t.Errorf("%v: %s", err, stdout)
			}
		}
	}
	if _, stderr, code := cli(t, "", "explain", "web-1/app", "--kv=file://"+dir); code != exitFailed {
		t.Errorf("explain: exit code %d: %s", code, stderr)
	}
	if _, stderr, code := cli(t, "", "explain", "prod/web/other", "--kv=file://"+dir); code != exitFailed ||
		!strings.Contains(stderr, prefix) {
		t.Errorf("explain of a unit that may be there: exit code %d: %s", code, stderr)
	}
}

// What is too much has to go; what only came late may come the next time.
func TestUnreadHints(t *testing.T) {
	t.Parallel()
	const much, late = "remove the keys that don't belong there; until", "try again"
	for _, c := range []struct {
		err  error
		want []string
		not  string
	}{
		{fmt.Errorf("%w below pins/", fleet.ErrTooMuch), []string{much}, late},
		{fmt.Errorf("%w below pins/", fleet.ErrLate), []string{late, "consul kv get -keys -separator= kedge/"}, much},
		{fmt.Errorf("%w; %w", fleet.ErrTooMuch, fleet.ErrLate), []string{much, late}, "is Consul up"},
	} {
		hint := new(app).storeHint(c.err)
		for _, want := range c.want {
			if !strings.Contains(hint, want) {
				t.Errorf("%v: %q is not in %s", c.err, want, hint)
			}
		}
		if strings.Contains(hint, c.not) {
			t.Errorf("%v: %s", c.err, hint)
		}
	}
}
