package dir_test

import (
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"kedge/deployments/fuzzlimit"
	"kedge/kv"
)

// Whatever the key, the store writes nowhere but below its directory, and what it took it gives back.
func FuzzKey(f *testing.F) {
	for _, key := range []string{"pins/prod/web/app", "../../etc/passwd", "a//b", "/abs", "a/./b", ".kedge/journal", "a\x00b", "a@/b", "CON", "é", strings.Repeat("a/", 40) + "a"} {
		f.Add(key)
	}
	f.Fuzz(func(t *testing.T, key string) {
		root := fuzzlimit.Dir(t)
		dir := filepath.Join(root, "store")
		s := open(t, dir)
		var err error
		fuzzlimit.Run(t, key, func() { err = s.Commit(t.Context(), nil, kv.Put(key, []byte("v"))) })
		if err == nil {
			e, err := s.Get(t.Context(), key)
			if err != nil || e.Key != key || string(e.Value) != "v" {
				t.Errorf("put %q, got %+v, %v", key, e, err)
			}
			entries, err := s.List(t.Context(), "")
			if err != nil || len(entries) != 1 || entries[0].Key != key {
				t.Errorf("put %q, listed %+v, %v", key, entries, err)
			}
		} else if entries, err := s.List(t.Context(), ""); err != nil || len(entries) != 0 {
			t.Errorf("the refused key %q left %+v, %v", key, entries, err)
		}
		err = filepath.WalkDir(root, func(path string, _ fs.DirEntry, err error) error {
			if err == nil && path != root && path != dir && !strings.HasPrefix(path, dir+string(os.PathSeparator)) {
				t.Errorf("the key %q made %s", key, path)
			}
			return err
		})
		if err != nil {
			t.Error(err)
		}
	})
}
