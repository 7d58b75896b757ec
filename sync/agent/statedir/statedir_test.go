package statedir

import (
	"os"
	"testing"

	"github.com/google/renameio/v2"
)

// A kill during a write leaves a temporary file: it is removed, and nothing else.
func TestLeftoversAreRemoved(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	names := []string{LastKnownFile, startingFile}
	for _, name := range names {
		if err := os.WriteFile(dir+"/"+name, []byte("{}"), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := renameio.NewPendingFile(dir+"/"+name, renameio.WithTempDir(dir)); err != nil {
			t.Fatal(err)
		}
	}
	if entries, err := os.ReadDir(dir); err != nil || len(entries) != 2*len(names) {
		t.Fatalf("%d files, %v", len(entries), err)
	}
	if err := (&Dir{path: dir}).removeLeftovers(); err != nil {
		t.Fatal(err)
	}
	for _, name := range names {
		if _, err := os.Stat(dir + "/" + name); err != nil {
			t.Error(err)
		}
	}
	if entries, err := os.ReadDir(dir); err != nil || len(entries) != len(names) {
		t.Errorf("%d files are left, %v", len(entries), err)
	}
}

// A name that was saved by another host, or that is invalid, is ignored.
func TestNodeName(t *testing.T) {
	t.Parallel()
	const host = "web-1.example"
	d := &Dir{path: t.TempDir()}
	if name := d.NodeName(host); name != "" {
		t.Errorf("without a file: %q", name)
	}
	if err := d.SetNodeName(host, "i-0abc"); err != nil || d.NodeName(host) != "i-0abc" || d.NodeName("web-2") != "" {
		t.Errorf("%v: %q, %q", err, d.NodeName(host), d.NodeName("web-2"))
	}
	for _, text := range []string{`{"host":"web-1.example`, `{"host":"web-1.example","node":"a/b"}`, `{"host":"web-1.example"}`} {
		if err := os.WriteFile(d.Path(nodeFile), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if name := d.NodeName(host); name != "" {
			t.Errorf("%s: %q", text, name)
		}
	}
}
