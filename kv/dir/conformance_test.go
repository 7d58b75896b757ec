package dir_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"kedge/kv"
	"kedge/kv/kvtest"
)

func TestConformance(t *testing.T) {
	t.Parallel()
	kvtest.Run(t, func(t *testing.T) kvtest.Backend {
		path := storePath(t)
		return kvtest.Backend{
			Open: func(tb testing.TB) kv.Store { return open(tb, path) },
			PutByHand: func(tb testing.TB, key, value string) { // as echo does
				if err := os.WriteFile(handPath(path, key), []byte(value), 0o644); err != nil {
					tb.Fatal(err)
				}
			},
			DeleteByHand: func(tb testing.TB, key string) {
				if err := os.Remove(handPath(path, key)); err != nil {
					tb.Fatal(err)
				}
			},
		}
	})
}

func handPath(path, key string) string {
	return filepath.Join(path, filepath.FromSlash(strings.TrimSuffix(key, "/")))
}

func BenchmarkWake(b *testing.B) {
	path := b.TempDir()
	kvtest.BenchmarkWake(b, open(b, path), func(value string) {
		if err := os.WriteFile(filepath.Join(path, "pins/prod/web/app"), []byte(value), 0o644); err != nil {
			b.Fatal(err)
		}
	})
}

func BenchmarkCommit(b *testing.B) { kvtest.BenchmarkCommit(b, open(b, b.TempDir())) }
