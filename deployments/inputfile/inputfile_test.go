package inputfile

import (
	"bytes"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
)

func TestSecretInsteadOfItsFile(t *testing.T) {
	t.Parallel()
	for _, setting := range []string{"KEDGE_GIT_TOKEN_FILE", "receiver chat: url_file"} {
		if _, err := Read(setting, "s3cret"); err == nil || strings.Contains(err.Error(), "s3cret") ||
			!strings.HasPrefix(err.Error(), setting+": there is no file of that name") {
			t.Errorf("%s: %v", setting, err)
		}
	}
}

func TestRead(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	in := func(name string) string { return filepath.Join(dir, name) }
	write := func(name string, data []byte) {
		t.Helper()
		if err := os.WriteFile(in(name), data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("file", []byte("secret\n"))
	write("most", bytes.Repeat([]byte("x"), Max))
	write("more", bytes.Repeat([]byte("x"), Max+1))
	if err := os.Symlink("file", in("link")); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Mkfifo(in("pipe"), 0o600); err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]string{
		in("file"): "", in("link"): "", in("most"): "", os.DevNull: "",
		in("more"): in("more") + " has more than 4 MiB", in("missing"): "no such file", in("."): "is a directory",
		"typo": "open typo: no such file", in("pipe"): "is a pipe", "/dev/zero": "/dev/zero is a device: name a regular file",
	} {
		for name, read := range map[string]func(string, string) ([]byte, error){"Read": Read, "ReadOnce": ReadOnce} {
			data, err := read("--key", path)
			if (err == nil) != (want == "") || err != nil && (!strings.HasPrefix(err.Error(), "--key: ") ||
				!strings.Contains(err.Error(), want) || data != nil) {
				t.Errorf("%s of %s: %d bytes, %v", name, path, len(data), err)
			}
		}
	}
	if data, err := Read("--key", in("link")); err != nil || string(data) != "secret\n" {
		t.Errorf("%q, %v", data, err)
	}
}

// A shell's <(command) is read once, and may be no larger than a file.
func TestReadPipe(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]string{"secret\n": "", strings.Repeat("x", Max+1): "has more than"} {
		r, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		go func() {
			_, _ = w.WriteString(text)
			w.Close()
		}()
		path := "/proc/self/fd/" + strconv.Itoa(int(r.Fd()))
		if _, err := Read("--key", path); err == nil {
			t.Error("a pipe is read again and again")
		}
		data, err := ReadOnce("--key", path)
		if (err == nil) != (want == "") || err == nil && string(data) != text ||
			err != nil && !strings.Contains(err.Error(), want) {
			t.Errorf("%d bytes, %v", len(data), err)
		}
		r.Close()
	}
}
