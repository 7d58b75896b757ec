package durable_test

import (
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"kedge/deployments/durable"
)

func TestWriteFileReplacesAndLeavesNothingBeside(t *testing.T) {
	dir, aside := t.TempDir(), t.TempDir()
	path := filepath.Join(dir, "file")
	for _, data := range []string{"one", "two, longer", "3"} {
		for name, write := range map[string]func() error{
			"WriteFile":    func() error { return durable.WriteFile(path, []byte(data), 0o600) },
			"WriteFileVia": func() error { return durable.WriteFileVia(aside, path, []byte(data), 0o600) },
		} {
			if err := write(); err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			if got, err := os.ReadFile(path); err != nil || string(got) != data {
				t.Errorf("%s left %q, %v; want %q", name, got, err, data)
			}
		}
	}
	for _, dir := range []string{dir, aside} {
		if files, err := os.ReadDir(dir); err != nil || len(files) > 1 {
			t.Errorf("%d files, %v; want no temporary ones", len(files), err)
		}
	}
	if info, err := os.Stat(path); err != nil || info.Mode() != fs.FileMode(0o600) {
		t.Errorf("mode %v, %v; want 0600", info.Mode(), err)
	}
}

func TestWriteFileWithoutItsDirectoryIsAnError(t *testing.T) {
	if err := durable.WriteFile(filepath.Join(t.TempDir(), "none", "file"), nil, 0o600); err == nil {
		t.Error("wrote into a directory that isn't there")
	}
	if err := durable.SyncDir(filepath.Join(t.TempDir(), "none")); err == nil {
		t.Error("synced a directory that isn't there")
	}
}
