package archive

import (
	"bytes"
	"io"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"kedge/artifact/treetest"
	"kedge/deployments"
)

func TestCompressionByName(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]string{
		"": "default", "default": "default", "fastest": "fastest", "fast": "fast", "best": "best",
		"1": "fastest", "2": "fastest", "3": "fast", "5": "fast", "6": "default", "9": "default", "10": "best", "22": "best",
	} {
		got := Compression(1)
		if err := got.Parse(text); err != nil || got.String() != want {
			t.Errorf("%q: %v, %v, want %s", text, got, err, want)
		}
	}
	for _, text := range []string{"0", "23", "-3", "max", "3.5", " 3"} {
		var got Compression
		if err := got.Parse(text); err == nil || !strings.Contains(err.Error(), "1 to 22") {
			t.Errorf("%q: %v, %v", text, got, err)
		}
	}
}

// That frames can be fetched alone does not make an archive larger than what tar and zstd make of the same tree; who
// asks for less of it gets less.
func TestPackIsAsSmallAsZstd(t *testing.T) {
	if testing.Short() {
		t.Skip("packs 5 MB of source files, wants tar and zstd")
	}
	t.Parallel()
	root, err := exec.Command("go", "env", "GOROOT").Output()
	if err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(strings.TrimSpace(string(root)), "src/net")
	var theirs bytes.Buffer
	pipeline := exec.Command("sh", "-c", `tar -C "$1" --sort=name -cf - . | zstd -q -3`, "sh", dir)
	pipeline.Stdout = &theirs
	if err := pipeline.Run(); err != nil {
		t.Fatal(err)
	}
	before := int64(0)
	for _, text := range []string{"best", "default", "fast", "fastest"} {
		var c Compression
		if err := c.Parse(text); err != nil {
			t.Fatal(err)
		}
		made, err := Pack(t.Context(), dir, deployments.SymlinksInside, c, io.Discard, nil)
		if err != nil {
			t.Fatal(err)
		}
		t.Logf("%s: %d bytes, zstd -3 makes %d", c, made.Size, theirs.Len())
		if c == CompressionDefault && made.Size > int64(theirs.Len()) {
			t.Errorf("the archive has %d bytes, one stream of zstd -3 has %d", made.Size, theirs.Len())
		}
		if made.Size <= before {
			t.Errorf("%s makes %d bytes, the one before %d", c, made.Size, before)
		}
		before = made.Size
	}
}

// What can't be made smaller is not worth the time: that is known before it is compressed.
func TestEvenlySpread(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		data string
		want bool
	}{
		"noise":              {treetest.Noise(1, 2<<20), true},
		"noise, much padded": {strings.Repeat(treetest.Noise(2, 512)+strings.Repeat("\x00", 512), 100), true},
		"text":               {strings.Repeat("func main() { fmt.Println(\"hello\") }\n", 1000), false},
		"zeros":              {strings.Repeat("\x00", 1<<20), false},
		"one byte":           {"a", false},
		"nothing":            {"", false},
	} {
		if got := looksIncompressible([]byte(c.data)); got != c.want {
			t.Errorf("%s: %v", name, got)
		}
	}
}
