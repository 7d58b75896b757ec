package artifact

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
)

// compressed is what the named program makes of data; a machine that deploys archives of its kind has it.
func compressed(t testing.TB, program string, data []byte, flags ...string) []byte {
	t.Helper()
	cmd := exec.Command(program, append([]string{"-c"}, flags...)...)
	cmd.Stdin = bytes.NewReader(data)
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%s: %v", program, err)
	}
	return out
}

// An archive of a kind that isn't read must never be taken for a single file: it would replace a whole tree.
func TestForeignArchives(t *testing.T) {
	t.Parallel()
	for _, f := range foreign {
		data := []byte(f.magic + strings.Repeat("x", 600))
		for _, name := range []string{"app.tar", "app.zip", "no-suffix"} {
			dir, err := unpackBytes(t, name, data)
			if err == nil || !strings.Contains(err.Error(), "it is a "+f.name+" archive") {
				t.Errorf("%s named %s: %v", f.name, name, err)
			}
			if left, _ := os.ReadDir(dir); len(left) > 0 {
				t.Errorf("%s named %s leaves %v", f.name, name, left)
			}
		}
		if _, err := unpackBytes(t, "app.tar.gz", gz(data)); err != nil && strings.Contains(err.Error(), "archive:") {
			t.Errorf("a single file in gzip that begins as %s does: %v", f.name, err)
		}
	}
	for _, name := range []string{"app.tar", "app.tar.br", "app.tar.foo", "app.tgz"} {
		if _, err := unpackBytes(t, name, []byte("no tar")); err == nil || !strings.Contains(err.Error(), "named as a tar") {
			t.Errorf("what is no tar, named %s: %v", name, err)
		}
	}
	for _, name := range []string{"app", "tar", "app.tarball", "app.tar.d.conf"} {
		if _, err := unpackBytes(t, name, []byte("a file")); err != nil {
			t.Errorf("a single file named %s: %v", name, err)
		}
	}
	jar := []byte("PK\x03\x04" + strings.Repeat("x", 600))
	dir, err := unpackBytes(t, "app.jar", jar)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := os.ReadFile(filepath.Join(dir, "app.jar")); err != nil || !bytes.Equal(got, jar) {
		t.Errorf("a jar is deployed as the file that it is: %d bytes, %v", len(got), err)
	}
}

// What a small archive makes a decoder hold is bounded, and what it decodes to as well.
func TestBombsOfOtherCompressions(t *testing.T) {
	zeros := tarOf(t, file("zeros", string(make([]byte, 64<<20))))
	for program, flags := range map[string][]string{"bzip2": {"-9"}, "xz": {"-9"}} {
		data := compressed(t, program, zeros, flags...)
		x := newExtractor(t)
		x.left = 1 << 20
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		err := x.bytes(data)
		runtime.ReadMemStats(&after)
		if err == nil || !strings.Contains(err.Error(), "bomb") {
			t.Errorf("%s: %v", program, err)
		}
		if took := after.TotalAlloc - before.TotalAlloc; took > 2*maxDictionary {
			t.Errorf("%s: it took %d MB", program, took>>20)
		}
	}
	huge := compressed(t, "xz", goodTar(t), "--lzma2=preset=0,dict=1GiB")
	if err := newExtractor(t).bytes(huge); err == nil || !strings.Contains(err.Error(), "dictionary") {
		t.Errorf("an xz stream with a dictionary of 1 GiB: %v", err)
	}
	for program, endings := range map[string]string{"bzip2": ".bz2", "xz": ".xz"} {
		data := compressed(t, program, goodTar(t))
		if _, err := unpackBytes(t, "app.tar"+endings, data[:len(data)/2]); err == nil || !strings.Contains(err.Error(), "cut off") && !strings.Contains(err.Error(), "truncated") {
			t.Errorf("half of a %s archive: %v", program, err)
		}
	}
}
