package git

import (
	"bytes"
	"fmt"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/go-git/go-git/v5/plumbing"

	"kedge/deployments/fuzzlimit"
	"kedge/sync/git/gittest"
)

func TestSplitSignature(t *testing.T) {
	t.Parallel()
	for _, c := range []struct{ name, raw, payload, signature string }{
		{"none", "tree 1\nauthor a\n\nmessage\n", "tree 1\nauthor a\n\nmessage\n", ""},
		{"one", "tree 1\ngpgsig -----BEGIN\n line\n \n -----END\nencoding x\n\nmessage\n",
			"tree 1\nencoding x\n\nmessage\n", "-----BEGIN\nline\n\n-----END\n"},
		{"the last header", "tree 1\ngpgsig A\n B\n\nmessage", "tree 1\n\nmessage", "A\nB\n"},
		{"in the message", "tree 1\n\ngpgsig A\n B\n", "tree 1\n\ngpgsig A\n B\n", ""},
		{"a second one is what was signed", "tree 1\ngpgsig A\ngpgsig B\n\nm", "tree 1\ngpgsig B\n\nm", "A\n"},
		{"no message", "tree 1\ngpgsig A", "tree 1\n", "A\n"},
		{"continuation of another header", "tree 1\nmergetag x\n gpgsig A\n\nm", "tree 1\nmergetag x\n gpgsig A\n\nm", ""},
	} {
		payload, signature := splitSignature([]byte(c.raw))
		if string(payload) != c.payload || string(signature) != c.signature {
			t.Errorf("%s: payload %q, signature %q", c.name, payload, signature)
		}
	}
}

// The split of a commit is the one that git(1) and ssh-keygen(1) accept.
func TestSplitSignatureAsGitSigns(t *testing.T) {
	t.Parallel()
	o := gittest.New(t)
	dir := t.TempDir()
	gittest.NewKey(t, filepath.Join(dir, "id"), "")
	public, err := exec.Command("ssh-keygen", "-y", "-f", filepath.Join(dir, "id")).Output()
	if err != nil {
		t.Fatal(err)
	}
	gittest.WriteFile(t, filepath.Join(dir, "id.pub"), string(public))
	gittest.WriteFile(t, filepath.Join(dir, "signers"), "ada@example.com "+string(public))
	o.Git(o.Work, "config", "gpg.format", "ssh")
	o.Git(o.Work, "config", "user.signingkey", filepath.Join(dir, "id.pub"))
	o.Git(o.Work, "config", "commit.gpgsign", "true")
	head := o.Push(map[string]string{"prod/web/app.yaml": unitFile("app/1")})

	from, err := OpenObjects(filepath.Join(o.Bare, "objects"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { from.Close() })
	commit, err := from.EncodedObject(plumbing.CommitObject, plumbing.NewHash(head))
	if err != nil {
		t.Fatal(err)
	}
	payload, signature, err := signedPart(commit)
	if err != nil {
		t.Fatal(err)
	}
	gittest.WriteFile(t, filepath.Join(dir, "signature"), string(signature))
	verify := func(payload []byte) error {
		cmd := exec.Command("ssh-keygen", "-Y", "verify", "-f", filepath.Join(dir, "signers"), "-I",
			"ada@example.com", "-n", "git", "-s", filepath.Join(dir, "signature"))
		cmd.Stdin = bytes.NewReader(payload)
		return cmd.Run()
	}
	if err := verify(payload); err != nil {
		t.Errorf("a good signature: %v\n%s", err, signature)
	}
	if err := verify(append(payload, 'x')); err == nil {
		t.Error("another payload has the same signature")
	}
}

// Whatever the bytes are, no byte is lost or added by the split.
func FuzzSplitSignature(f *testing.F) {
	f.Add([]byte("tree 1\ngpgsig A\n B\n\nmessage\n"))
	f.Add([]byte("gpgsig \n \n\n"))
	f.Add([]byte("\n"))
	f.Fuzz(func(t *testing.T, raw []byte) {
		var payload, signature []byte
		fuzzlimit.Run(t, raw, func() { payload, signature = splitSignature(raw) })
		if signature == nil {
			if !bytes.Equal(payload, raw) {
				t.Fatalf("%q became %q", raw, payload)
			}
			return
		}
		lines := strings.Split(strings.TrimSuffix(string(signature), "\n"), "\n")
		header := "gpgsig " + strings.Join(lines, "\n ")
		at := bytes.Index(append([]byte("\n"), raw...), []byte("\n"+header)) // at a line's start
		if at < 0 {
			t.Fatalf("%q isn't in %q", header, raw)
		}
		rest := bytes.TrimPrefix(raw[at+len(header):], []byte("\n"))
		if joined := append(bytes.Clone(raw[:at]), rest...); !bytes.Equal(joined, payload) {
			t.Fatalf("%q without %q became %q", raw, header, payload)
		}
	})
}

func TestDescends(t *testing.T) {
	t.Parallel()
	o := gittest.New(t)
	root := o.Commit(map[string]string{"a": "1"})
	o.Git(o.Work, "checkout", "-q", "-b", "side")
	side := o.Commit(map[string]string{"b": "1"})
	o.Git(o.Work, "checkout", "-q", "main")
	left := o.Commit(map[string]string{"a": "2"})
	o.Git(o.Work, "merge", "-q", "--no-edit", "side")
	merge := o.Git(o.Work, "rev-parse", "HEAD")
	// A clock that went back must not hide an ancestor.
	o.Env = []string{"GIT_COMMITTER_DATE=2001-01-01T00:00:00Z"}
	old := o.Commit(map[string]string{"a": "3"})
	o.Env = nil
	tip := o.Commit(map[string]string{"a": "4"})
	from, err := OpenObjects(filepath.Join(o.Work, ".git", "objects"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { from.Close() })
	for _, c := range []struct {
		from, to string
		want     bool
	}{
		{root, root, true}, {root, tip, true}, {side, merge, true}, {left, merge, true}, {old, tip, true}, {merge,
			tip, true}, {side, tip, true},
		{tip, root, false}, {left, side, false}, {merge, side, false}, {strings.Repeat("1", 40), tip, false},
	} {
		got, err := from.Descends(t.Context(), c.from, c.to)
		if err != nil || got != c.want {
			t.Errorf("from %.7s to %.7s: %v, %v; want %v", c.from, c.to, got, err, c.want)
		}
	}
}

// BenchmarkLoad reads and checks a commit of 1,000 units.
func BenchmarkLoad(b *testing.B) {
	for _, packed := range []bool{false, true} {
		b.Run(map[bool]string{false: "loose", true: "packed"}[packed], func(b *testing.B) {
			o := gittest.New(b)
			files := map[string]string{}
			for i := range 1000 {
				files[fmt.Sprintf("prod/r%d/u%d.yaml", i%50, i)] = unitFile(fmt.Sprint("u/", i))
			}
			head := o.Push(files)
			if packed {
				o.Git(o.Bare, "gc", "-q")
			}
			b.ReportAllocs()
			for b.Loop() {
				from, err := OpenObjects(filepath.Join(o.Bare, "objects"))
				if err != nil {
					b.Fatal(err)
				}
				if _, err := from.Load(head, nil); err != nil {
					b.Fatal(err)
				}
				from.Close()
			}
		})
	}
}
