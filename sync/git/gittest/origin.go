// Package gittest makes real Git repositories for tests, on disk and behind HTTPS and SSH.
package gittest

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// Env returns variables for git(1) that set the commits' author, and keep out the user's own configuration.
func Env() []string {
	return []string{
		"GIT_CONFIG_GLOBAL=/dev/null", "GIT_CONFIG_NOSYSTEM=1", "GIT_TERMINAL_PROMPT=0",
		"GIT_AUTHOR_NAME=Ada", "GIT_AUTHOR_EMAIL=ada@example.com",
		"GIT_COMMITTER_NAME=Ada", "GIT_COMMITTER_EMAIL=ada@example.com",
	}
}

// Origin is a bare repository, and a clone from which the test pushes with git(1).
type Origin struct {
	TB         testing.TB
	Bare, Work string
	Env        []string // further variables for git
}

// New makes an empty repository and an empty clone, both on branch main.
func New(tb testing.TB) *Origin {
	tb.Helper()
	dir := tb.TempDir()
	o := &Origin{TB: tb, Bare: filepath.Join(dir, "deployments.git"), Work: filepath.Join(dir, "work")}
	o.Git("", "init", "-q", "--bare", "-b", "main", o.Bare)
	o.Git("", "init", "-q", "-b", "main", o.Work)
	o.Git(o.Work, "remote", "add", "origin", o.Bare)
	return o
}

// Git runs git(1) in dir; empty: the current directory. It returns the output, trimmed, and ends the test if git fails.
func (o *Origin) Git(dir string, args ...string) string {
	o.TB.Helper()
	out, err := o.Try(dir, args...)
	if err != nil {
		o.TB.Fatalf("git %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return strings.TrimSpace(out)
}

// Try runs git(1) in dir, and returns its output and errors, also if it fails.
func (o *Origin) Try(dir string, args ...string) (string, error) {
	cmd := exec.Command("git", append([]string{"-c", "gc.auto=0", "-c", "core.fsync=none"}, args...)...)
	cmd.Dir = dir
	cmd.Env = append(append(os.Environ(), Env()...), o.Env...)
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// Commit writes files, by name, and commits all changes in Work; an empty text removes the file. It returns the hash.
func (o *Origin) Commit(files map[string]string) string {
	o.TB.Helper()
	for name, text := range files {
		path := filepath.Join(o.Work, name)
		if text == "" {
			if err := os.Remove(path); err != nil {
				o.TB.Fatal(err)
			}
			continue
		}
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			o.TB.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			o.TB.Fatal(err)
		}
	}
	o.Git(o.Work, "add", "-A")
	o.Git(o.Work, "commit", "-q", "--allow-empty", "-m", "Deploy")
	return o.Git(o.Work, "rev-parse", "HEAD")
}

// Push commits files as Commit does, and pushes the head to main.
func (o *Origin) Push(files map[string]string) string {
	o.TB.Helper()
	hash := o.Commit(files)
	o.Git(o.Work, "push", "-q", "origin", "HEAD:main")
	return hash
}

// ForcePush commits files as Commit does, and pushes the head to main by force.
func (o *Origin) ForcePush(files map[string]string) string {
	o.TB.Helper()
	hash := o.Commit(files)
	o.Git(o.Work, "push", "-q", "-f", "origin", "HEAD:main")
	return hash
}

// Refer makes n further references to a commit, as code review hosts do. It replaces all packed references.
func (o *Origin) Refer(n int, hash string) {
	o.TB.Helper()
	var refs strings.Builder
	refs.WriteString("# pack-refs with: peeled fully-peeled sorted \n")
	for i := range n {
		fmt.Fprintf(&refs, "%s refs/changes/%06d\n", hash, i)
	}
	WriteFile(o.TB, filepath.Join(o.Bare, "packed-refs"), refs.String())
}

// Write runs git(1) in Work with the text in on standard input, for a command that writes an object.
// It returns the output, which is the object's hash.
func (o *Origin) Write(in string, args ...string) string {
	o.TB.Helper()
	cmd := exec.Command("git", args...)
	cmd.Dir, cmd.Env, cmd.Stdin = o.Work, append(append(os.Environ(), Env()...), o.Env...), strings.NewReader(in)
	out, err := cmd.CombinedOutput()
	if err != nil {
		o.TB.Fatalf("git %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return strings.TrimSpace(string(out))
}

// SignBy makes a key in file, makes o sign its commits with it, and returns the public key's line.
func (o *Origin) SignBy(file string) string {
	o.TB.Helper()
	NewKey(o.TB, file, "")
	public, err := exec.Command("ssh-keygen", "-y", "-f", file).Output()
	if err != nil {
		o.TB.Fatal(err)
	}
	WriteFile(o.TB, file+".pub", string(public))
	o.SignWith(file)
	return string(public)
}

// SignWith makes o sign its commits with the SSH key in file.
func (o *Origin) SignWith(file string) {
	o.Git(o.Work, "config", "gpg.format", "ssh")
	o.Git(o.Work, "config", "user.signingkey", file+".pub")
	o.Git(o.Work, "config", "commit.gpgsign", "true")
}

// WriteFile writes a file that only its owner may read.
func WriteFile(tb testing.TB, name, text string) {
	tb.Helper()
	if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
		tb.Fatal(err)
	}
}
