package git

import (
	"crypto/sha256"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"kedge/deployments"
	"kedge/sync/git/gittest"
)

// pointer returns an invented release.
func pointer(name string) deployments.Pointer {
	return deployments.Pointer{
		URL:    "s3://acme-releases/" + name + "/manifest.yaml",
		Digest: deployments.Digest(sha256.Sum256([]byte(name))),
	}
}

// unitFile returns a unit's file with only a release.
func unitFile(release string) string { return "release: " + pointer(release).String() + "\n" }

// env returns a Config.Env with these pairs.
func env(pairs ...string) func(string) string {
	return func(name string) string {
		for i := 0; i < len(pairs); i += 2 {
			if pairs[i] == name {
				return pairs[i+1]
			}
		}
		return ""
	}
}

// blob makes a file's object.
func blob(o *gittest.Origin, text string) string {
	return o.Write(text, "hash-object", "-w", "--stdin")
}

// literally makes an object that git(1) itself would not make.
func literally(o *gittest.Origin, kind, raw string) string {
	return o.Write(raw, "hash-object", "-t", kind, "-w", "--literally", "--stdin")
}

// mktree makes a directory's object from lines in the format of git ls-tree.
func mktree(o *gittest.Origin, lines ...string) string {
	return o.Write(strings.Join(lines, "\n")+"\n", "mktree")
}

// under puts a tree into nested directories.
func under(o *gittest.Origin, dir string, names ...string) string {
	for i := len(names) - 1; i >= 0; i-- {
		dir = mktree(o, "040000 tree "+dir+"\t"+names[i])
	}
	return dir
}

// loads reads a commit of the work clone, as the mirror would.
func loads(o *gittest.Origin, hash string) error {
	o.TB.Helper()
	in, err := OpenObjects(filepath.Join(o.Work, ".git", "objects"))
	if err != nil {
		o.TB.Fatal(err)
	}
	defer in.Close()
	_, err = in.Load(hash, nil)
	return err
}

func readFile(t *testing.T, name string) string {
	t.Helper()
	data, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}
