package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// kedge run gives commands a secret that --secrets allows, and refuses one that it doesn't.
func TestRunWithSecrets(t *testing.T) {
	t.Parallel()
	const value = "hunter2-is-no-password"
	r := newOldRelease(t, 10, "secrets: {DB: file:DIR/secrets/db}\ncommands: {post: ['echo \"$DB\" | tee DIR/told']}\n")
	dir := filepath.Join(r.dir, "secrets")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "db"), []byte(value+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		allowed, says string
		code          int
	}{
		{"", "name it under secrets", exitFailed},
		{"ssm:/prod/", "name it under secrets", exitFailed},
		{"*", "want a reference, or its beginning", exitUsage},
		{"file:" + dir + "/", "***", exitDone},
	} {
		_, stderr, code := cli(t, "", "run", "--secrets", c.allowed, r.url())
		if code != c.code || !strings.Contains(strings.Join(strings.Fields(stderr), " "), c.says) ||
			strings.Contains(stderr, "hunter2") {
			t.Errorf("--secrets %q: exit code %d, want %d and %q\n%s", c.allowed, code, c.code, c.says, stderr)
		}
	}
	if told, err := os.ReadFile(filepath.Join(r.dir, "told")); err != nil || string(told) != value+"\n" {
		t.Errorf("the command was given %q, %v", told, err)
	}
}
