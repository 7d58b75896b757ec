package migrate

import (
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"kedge/deployments"
)

// within fails if f doesn't return, as it waits for a pipe's writer or reads a file without an end.
func within(t *testing.T, name string, f func()) {
	t.Helper()
	done := make(chan struct{})
	go func() { defer close(done); f() }()
	select {
	case <-done:
	case <-time.After(time.Minute):
		t.Fatalf("%s: it is still read", name)
	}
}

// What is checked, or imported into, may be a stranger's work tree: nothing but regular files of bounded size is read,
// and nothing outside is written.
func TestStrangersWorkTrees(t *testing.T) {
	t.Parallel()
	p := newPlace(t)
	large := p.write("large.yml", strings.Repeat("#", deployments.MaxManifest+1))
	for name, make := range map[string]func(at string) error{
		"a device":     func(at string) error { return os.Symlink("/dev/zero", at) },
		"a pipe":       func(at string) error { return unix.Mkfifo(at, 0o644) },
		"a large file": func(at string) error { return os.Symlink(strings.TrimPrefix(large, "file://"), at) },
	} {
		at := filepath.Join(t.TempDir(), "100% a manifest?.yml")
		if err := make(at); err != nil {
			t.Fatal(err)
		}
		within(t, name, func() {
			if _, err := Find(t.Context(), p.objects, at, nil); err == nil || len(err.Error()) > 1000 {
				t.Errorf("%s is read: %v", name, err)
			}
		})
	}
	odd := p.write("100% a manifest?.yml", "dest: /srv/app\n")
	found, err := Find(t.Context(), p.objects, strings.TrimPrefix(odd, "file://"), nil)
	if err != nil || len(found) != 1 || string(found[0].Raw) != "dest: /srv/app\n" {
		t.Errorf("%+v, %v", found, err)
	}
	long, err := Find(t.Context(), p.objects, "-", io.LimitReader(zeros{}, 10*deployments.MaxManifest))
	if err != nil || len(long) != 1 || len(long[0].Raw) > deployments.MaxManifest+1 {
		t.Errorf("of standard input %d are read, %v", len(long[0].Raw), err)
	}

	pointer, err := deployments.ParsePointer("s3://acme/$1/m.yml@sha256:" + strings.Repeat("0a", 32))
	if err != nil {
		t.Fatal(err)
	}
	const unit = "release: s3://acme/old/m.yml@sha256:0 # ours\n"
	for name, make := range map[string]func(repo, outside string) error{
		"a stage elsewhere": func(repo, outside string) error { return os.Symlink(outside, filepath.Join(repo, "prod")) },
		"a file elsewhere": func(repo, outside string) error {
			return errors.Join(os.MkdirAll(filepath.Join(repo, "prod/web"), 0o755),
				os.WriteFile(outside+"/x", []byte(unit), 0o600),
				os.Symlink(outside+"/x", filepath.Join(repo, "prod/web/app.yaml")))
		},
		"a device": func(repo, _ string) error {
			return errors.Join(os.MkdirAll(filepath.Join(repo, "prod/web"), 0o755),
				os.Symlink("/dev/zero", filepath.Join(repo, "prod/web/app.yaml")))
		},
		"a pipe": func(repo, _ string) error {
			return errors.Join(os.MkdirAll(filepath.Join(repo, "prod/web"), 0o755),
				unix.Mkfifo(filepath.Join(repo, "prod/web/app.yaml"), 0o644))
		},
	} {
		repo, outside := t.TempDir(), t.TempDir()
		if err := make(repo, outside); err != nil {
			t.Fatal(err)
		}
		within(t, name, func() {
			if written, err := writeUnit(repo, "prod/web/app.yaml", "s3://acme/m.yml", pointer); err == nil || written {
				t.Errorf("%s is written to: %v", name, err)
			}
		})
		files, err := os.ReadDir(outside)
		if err != nil || len(files) > 1 {
			t.Errorf("%s: outside are %v, %v", name, files, err)
		}
		if text, err := os.ReadFile(outside + "/x"); err == nil && string(text) != unit {
			t.Errorf("%s: outside is %q", name, text)
		}
	}
	repo := t.TempDir()
	file := filepath.Join(repo, "prod/web/app.yaml")
	if err := errors.Join(os.MkdirAll(filepath.Dir(file), 0o755), os.WriteFile(file, []byte(unit), 0o644)); err != nil {
		t.Fatal(err)
	}
	if _, err := writeUnit(repo, "prod/web/app.yaml", "s3://acme/m.yml", pointer); err != nil {
		t.Fatal(err)
	}
	if text, err := os.ReadFile(file); err != nil || string(text) != "release: "+pointer.String()+" # ours\n" {
		t.Errorf("%q, %v", text, err)
	}
}

// zeros is a file without an end.
type zeros struct{}

func (zeros) Read(p []byte) (int, error) { return len(p), nil }
