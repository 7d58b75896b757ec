package artifact

import (
	"archive/tar"
	"bufio"
	"bytes"
	"compress/gzip"
	"crypto/md5"
	"crypto/sha1"
	"crypto/sha512"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/klauspost/compress/zstd"

	"kedge/artifact/object"
	"kedge/artifact/safefs"
	"kedge/artifact/treetest"
	"kedge/deployments"
	"kedge/deployments/fuzzlimit"
	"kedge/deployments/tooltest"
)

// tarOf makes a tar; a regular entry's content is in its Linkname.
func tarOf(t testing.TB, headers ...tar.Header) []byte {
	t.Helper()
	var out bytes.Buffer
	w := tar.NewWriter(&out)
	for _, h := range headers {
		content := ""
		if h.Typeflag == tar.TypeReg {
			content, h.Linkname = h.Linkname, ""
			h.Size = int64(len(content))
		}
		if h.Mode == 0 {
			h.Mode = 0o644
		}
		if err := w.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write([]byte(content)); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

func file(name, content string) tar.Header {
	return tar.Header{Typeflag: tar.TypeReg, Name: name, Linkname: content}
}

func special(kind byte, name, target string) tar.Header {
	return tar.Header{Typeflag: kind, Name: name, Linkname: target}
}

func gz(data []byte) []byte {
	var out bytes.Buffer
	w := gzip.NewWriter(&out)
	w.Write(data)
	w.Close()
	return out.Bytes()
}

func zst(t testing.TB, data []byte) []byte {
	w, err := zstd.NewWriter(nil)
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	return w.EncodeAll(data, nil)
}

// unpackBytes unpacks an object of these bytes, with the right checksum.
func unpackBytes(t testing.TB, name string, data []byte) (dir string, err error) {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, data, 0o644); err != nil {
		t.Fatal(err)
	}
	dir = treetest.TempDir(t)
	m := &deployments.Manifest{Src: "file://" + path, Checksum: deployments.DigestOf(data).String()}
	return dir, Unpack(t.Context(), object.New(object.Config{}), m, dir, StageOptions{})
}

func goodTar(t testing.TB) []byte {
	time := time.Date(2024, 5, 6, 7, 8, 9, 0, time.UTC)
	return tarOf(t,
		tar.Header{Typeflag: tar.TypeDir, Name: "./", Mode: 0o755},
		tar.Header{Typeflag: tar.TypeDir, Name: "./closed/", Mode: 0o555, ModTime: time},
		tar.Header{Typeflag: tar.TypeReg, Name: "./closed/run", Mode: 0o755, Linkname: "#!/bin/sh\n", ModTime: time},
		file("deep/er/file", "content"),
		special(tar.TypeSymlink, "link", "deep/er/file"),
		special(tar.TypeLink, "hard", "./closed/run"),
		file(treetest.Long("name/", 300)+"x", "long"),
		file("deep/er/file", "replaced"),
	)
}

func TestArchivesOfAnyone(t *testing.T) {
	t.Parallel()
	plain := goodTar(t)
	for name, data := range map[string][]byte{
		"app.tar": plain, "app.tar.gz": gz(plain), "app.tgz": gz(plain), "app.tar.zst": zst(t, plain), "no-suffix": gz(plain),
		"frames.tar.zst": append(zst(t, plain[:5000]), zst(t, plain[5000:])...),
		"app.tar.bz2":    compressed(t, "bzip2", plain), "app.tar.xz": compressed(t, "xz", plain), "app.tbz": compressed(t, "bzip2", plain),
		"streams.tar.xz": append(compressed(t, "xz", plain[:5120]), compressed(t, "xz", plain[5120:])...),
		// As pzstd and the seekable format have them.
		"skippable.tar.zst": append([]byte{0x5a, 0x2a, 0x4d, 0x18, 2, 0, 0, 0, 'x', 'y'}, zst(t, plain)...),
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir, err := unpackBytes(t, name, data)
			if err != nil {
				t.Fatal(err)
			}
			for p, want := range map[string]string{"closed/run": "#!/bin/sh\n", "link": "replaced", "hard": "#!/bin/sh\n",
				treetest.Long("name/", 300) + "x": "long"} {
				if got, err := os.ReadFile(filepath.Join(dir, p)); err != nil || string(got) != want {
					t.Errorf("%s: %q, %v", p, got, err)
				}
			}
			for p, mode := range map[string]fs.FileMode{"closed": fs.ModeDir | 0o555, "closed/run": 0o755, "deep": fs.ModeDir | 0o755} {
				if info, err := os.Stat(filepath.Join(dir, p)); err != nil || info.Mode() != mode {
					t.Errorf("%s: %v, %v", p, info.Mode(), err)
				}
			}
			for _, p := range []string{"closed", "closed/run"} {
				if info, _ := os.Stat(filepath.Join(dir, p)); info.ModTime().Year() != 2024 {
					t.Errorf("%s is of %v", p, info.ModTime())
				}
			}
		})
	}
}

// Files with holes have them as zeros, and count as long as they are.
func TestSparseFiles(t *testing.T) {
	t.Parallel()
	for name, format := range map[string]string{"gnu": "--format=gnu", "pax": "--format=posix"} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			tree := t.TempDir()
			tarred := func(size int64) []byte {
				path := filepath.Join(tree, "file")
				if err := os.WriteFile(path, []byte("begin"), 0o644); err != nil {
					t.Fatal(err)
				}
				if err := os.Truncate(path, size); err != nil {
					t.Fatal(err)
				}
				data, err := exec.Command("tar", "-C", tree, "-cS", format, "file").Output()
				if err != nil {
					t.Fatal(err)
				}
				return data
			}
			data := tarred(3 << 20)
			if len(data) > 1<<20 {
				t.Fatalf("tar wrote %d bytes: nothing is sparse", len(data))
			}
			dir, err := unpackBytes(t, "app.tar", data)
			if err != nil {
				t.Fatal(err)
			}
			treetest.Same(t, dir, tree)
			if _, err := unpackBytes(t, "bomb.tar", tarred(freeGrowth+1)); !errors.Is(err, errBomb) {
				t.Errorf("a hole of a GiB: %v", err)
			}
		})
	}
}

// What tar wrote before POSIX is told from a single file by its header's checksum.
func TestAnOldTar(t *testing.T) {
	t.Parallel()
	data := tarOf(t, file("file", "content"))
	clear(data[257:512]) // the magic, and what came with it
	copy(data[148:156], "        ")
	sum := 0
	for _, b := range data[:512] {
		sum += int(b)
	}
	copy(data[148:156], fmt.Sprintf("%06o\x00 ", sum))
	dir, err := unpackBytes(t, "app.tar", data)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := os.ReadFile(filepath.Join(dir, "file")); err != nil || string(got) != "content" {
		t.Errorf("%q, %v", got, err)
	}
}

// An archive's owners are taken over by root alone, by name where the name is known here, and not where the
// manifest says another.
func TestOwnersOfAnArchive(t *testing.T) {
	t.Parallel()
	tooltest.NeedRoot(t)
	var headers []tar.Header
	for _, h := range []tar.Header{
		{Typeflag: tar.TypeDir, Name: "./", Mode: 0o700}, {Typeflag: tar.TypeDir, Name: "dir/", Mode: 0o2775},
		{Typeflag: tar.TypeDir, Name: "tmp/", Mode: 0o1777}, file("dir/file", "x"), special(tar.TypeSymlink, "dir/link", "file"),
	} {
		h.Uid, h.Gid = 4321, 1234
		headers = append(headers, h)
	}
	named := headers[3]
	named.Name, named.Uname, named.Gname = "named", "daemon", "nosuchgroup"
	data := tarOf(t, append(headers, named)...)
	path := filepath.Join(t.TempDir(), "app.tar")
	if err := os.WriteFile(path, data, 0o644); err != nil {
		t.Fatal(err)
	}
	daemon, err := safefs.LookupUID("daemon")
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		strategy    deployments.Strategy
		owner       string
		want, named string
	}{
		{deployments.StrategyRsync, "", "4321:1234", daemon + ":1234"},
		{deployments.StrategyRsync, "77", "77:0", "77:0"},
		{deployments.StrategyRsync, ":88", "0:88", "0:88"},
		{deployments.StrategyRelease, "", "4321:1234", daemon + ":1234"},
	} {
		dir := t.TempDir()
		m := &deployments.Manifest{
			Src:      "file://" + path,
			Checksum: strings.ToUpper(deployments.DigestOf(data).String()),
			Size:     int64(len(data)),
			Strategy: c.strategy,
			Owner:    c.owner,
		}
		if err := Unpack(t.Context(), object.New(object.Config{}), m, dir, StageOptions{}); err != nil {
			t.Fatal(err)
		}
		for p, mode := range map[string]fs.FileMode{
			".": 0, "dir": fs.ModeDir | fs.ModeSetgid | 0o775, "tmp": fs.ModeDir | fs.ModeSticky | 0o777, "dir/file": 0o644, "dir/link": 0, "named": 0o644,
		} {
			info, err := os.Lstat(filepath.Join(dir, p))
			if err != nil {
				t.Fatal(err)
			}
			if mode != 0 && info.Mode() != mode {
				t.Errorf("%s has mode %s, want %s", p, info.Mode(), mode)
			}
			want := c.want
			if p == "named" {
				want = c.named
			}
			st := info.Sys().(*syscall.Stat_t)
			if got := fmt.Sprintf("%d:%d", st.Uid, st.Gid); got != want {
				t.Errorf("%s with owner %q: %s belongs to %s, want %s", c.strategy, c.owner, p, got, want)
			}
		}
	}
	denied := errors.New("not theirs")
	allowed := func(uid, gid int) error {
		if uid != 4321 || gid != 1234 {
			return denied
		}
		return nil
	}
	for owner, want := range map[string]error{"": denied, "77": nil} {
		m := &deployments.Manifest{Src: "file://" + path, Checksum: deployments.DigestOf(data).String(), Owner: owner}
		if err := unpack(
			t.Context(),
			object.New(object.Config{}),
			m,
			t.TempDir(),
			StageOptions{},
			allowed,
		); !errors.Is(
			err,
			want,
		) {
			t.Errorf("with owner %q, where owners are bounded: %v", owner, err)
		}
	}
	m := &deployments.Manifest{Src: "file://" + path, Checksum: deployments.DigestOf(data).String(),
		Size: int64(len(data)) - 1}
	if err := Unpack(
		t.Context(),
		object.New(object.Config{}),
		m,
		t.TempDir(),
		StageOptions{},
	); !errors.Is(
		err,
		deployments.ErrDigest,
	) {
		t.Errorf("of another size than the manifest says: %v", err)
	}
}

func TestSingleFile(t *testing.T) {
	t.Parallel()
	for content, mode := range map[string]fs.FileMode{"#!/bin/sh\n": 0o755, "\x7fELF\x02": 0o755, "just text": 0o644,
		"#!/bin/sh\n" + strings.Repeat("# long\n", 1<<17): 0o755} {
		dir, err := unpackBytes(t, "tool", []byte(content))
		if err != nil {
			t.Fatal(err)
		}
		if info, err := os.Stat(filepath.Join(dir, "tool")); err != nil || info.Mode() != mode {
			t.Errorf("%v, %v", info, err)
		}
	}
}

// A single file is called as its URL's path ends, without a presigned URL's signature.
func TestSingleFileOfASignedURL(t *testing.T) {
	t.Parallel()
	data := []byte("just text")
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(data))
	}))
	defer server.Close()
	dir := t.TempDir()
	m := &deployments.Manifest{Src: server.URL + "/tools/my%2Btool?Signature=a/b",
		Checksum: deployments.DigestOf(data).String()}
	if err := Unpack(t.Context(), object.New(object.Config{}), m, dir, StageOptions{}); err != nil {
		t.Fatal(err)
	}
	if got := treetest.List(t, dir); len(got) != 1 || got[0] != "my+tool" {
		t.Errorf("it is called %q", got)
	}
}

// hostile archives, each with a word that its error must have.
func hostile(t testing.TB) map[string]struct {
	data []byte
	says string
} {
	dir := tar.Header{Typeflag: tar.TypeDir, Name: "dir", Mode: 0o755}
	out := map[string]struct {
		data []byte
		says string
	}{}
	add := func(name, says string, headers ...tar.Header) {
		out[name] = struct {
			data []byte
			says string
		}{tarOf(t, headers...), says}
	}
	add("absolute", "absolute", file("/etc/evil", "x"))
	add("dots", "..", file("a/../../evil", "x"))
	add("dots in the end", "..", tar.Header{Typeflag: tar.TypeDir, Name: "a/..", Mode: 0o755})
	add("link out", "leads out", special(tar.TypeSymlink, "link", "../../etc"))
	add("absolute link", "leads out", special(tar.TypeSymlink, "link", "/etc/passwd"))
	add("link up by a detour", "leads out", dir, special(tar.TypeSymlink, "link", "dir/../../x"))
	add("a line's end in a name", "line break", file("a\nb", "x"))
	add("through a link", "through the symbolic link",
		dir, special(tar.TypeSymlink, "link", "dir"), file("link/evil", "x"))
	add(
		"directory over a link",
		"but an earlier entry of the same name is not",
		dir,
		special(tar.TypeSymlink, "link", "dir"),
		tar.Header{Typeflag: tar.TypeDir, Name: "link", Mode: 0o755},
	)
	add("link over a directory", "replace a directory", dir, file("dir/x", "x"), special(tar.TypeSymlink, "dir", "."))
	add("hard link out", "..", special(tar.TypeLink, "hard", "../../etc/passwd"))
	add("absolute hard link", "absolute", special(tar.TypeLink, "hard", "/etc/passwd"))
	add("hard link to nothing", "not an earlier file", special(tar.TypeLink, "hard", "nothing"))
	add(
		"hard link to a link",
		"not an earlier file",
		file("x", "x"),
		special(tar.TypeSymlink, "link", "x"),
		special(tar.TypeLink, "hard", "link"),
	)
	add("hard link to itself", "", file("x", "x"), special(tar.TypeLink, "x", "x"))
	add("device", "device", special(tar.TypeChar, "null", ""))
	add("block device", "device", special(tar.TypeBlock, "disk", ""))
	add("fifo", "pipe", special(tar.TypeFifo, "fifo", ""))
	add("setuid", "setuid", tar.Header{Typeflag: tar.TypeReg, Name: "su", Mode: 0o4755})
	add("setgid", "setgid", tar.Header{Typeflag: tar.TypeReg, Name: "sg", Mode: 0o2755})
	add("deep", "deep", file(strings.Repeat("d/", 1000)+"x", "x"))
	add("long name", "bytes", file(strings.Repeat("n", 5000), "x"))
	add("a file as a directory", "", file("x", "x"), file("x/y", "y"))
	add("the tree itself a link", "itself", special(tar.TypeSymlink, "./", "x"))
	return out
}

func TestHostileArchives(t *testing.T) {
	t.Parallel()
	for name, h := range hostile(t) {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			for suffix, data := range map[string][]byte{".tar": h.data, ".tar.gz": gz(h.data), ".tar.zst": zst(t, h.data)} {
				dir, err := unpackBytes(t, "app"+suffix, data)
				if err == nil || !strings.Contains(err.Error(), h.says) || !strings.Contains(err.Error(), "entry") {
					t.Errorf("%s: %v, which should name the entry and say %q", suffix, err, h.says)
				}
				if _, err := os.Lstat(filepath.Join(filepath.Dir(dir), "evil")); err == nil {
					t.Errorf("%s wrote outside of the tree", suffix)
				}
			}
		})
	}
}

// What is wrong with an archive must not stay on disk, nor count as a release.
func TestNothingStaysOfACutStage(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "app.tar")
	if err := os.WriteFile(path, tarOf(t, file("file", "content")), 0o644); err != nil {
		t.Fatal(err)
	}
	releases := Open(filepath.Join(t.TempDir(), "app"), object.New(object.Config{}), nil)
	raw := []byte("manifest")
	p := deployments.Pointer{URL: "file:///m", Digest: deployments.DigestOf(raw)}
	if err := os.MkdirAll(filepath.Join(releases.private(), stagingPrefix+p.Digest.Short(), "stray"), 0o755); err != nil {
		t.Fatal(err)
	}
	m := &deployments.Manifest{
		Src:      "file://" + path,
		Checksum: deployments.DigestOf(tarOf(t, file("file", "content"))).String(),
		DestMode: 0o755,
	}
	rel, err := releases.Stage(t.Context(), p, m, raw, StageOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if got := treetest.List(t, rel.Dir); len(got) != 1 {
		t.Errorf("it has %q", got)
	}
}

func TestNothingStaysOfABadArchive(t *testing.T) {
	t.Parallel()
	plain := goodTar(t)
	packedTar := gz(plain)
	flipped := bytes.Clone(packedTar)
	flipped[len(flipped)/2] ^= 0x10
	page := []byte("<html><title>503</title></html>")
	for name, c := range map[string]struct {
		data []byte
		sum  string // of what the manifest wants
		want error
	}{
		"cut off, as published": {packedTar[:len(packedTar)/2],
			deployments.DigestOf(packedTar[:len(packedTar)/2]).String(), nil},
		"cut off on the way": {packedTar[:len(packedTar)/2], deployments.DigestOf(packedTar).String(),
			deployments.ErrDigest},
		"a tar cut at an entry":      {plain[:1024], deployments.DigestOf(plain).String(), deployments.ErrDigest},
		"a flipped bit":              {flipped, deployments.DigestOf(packedTar).String(), deployments.ErrDigest},
		"an error page":              {page, deployments.DigestOf(packedTar).String(), deployments.ErrDigest},
		"another archive, by md5":    {zst(t, plain), fmt.Sprintf("%x", md5.Sum(packedTar)), deployments.ErrDigest},
		"another archive, by sha1":   {zst(t, plain), fmt.Sprintf("%x", sha1.Sum(packedTar)), deployments.ErrDigest},
		"another archive, by sha512": {zst(t, plain), fmt.Sprintf("%x", sha512.Sum512(packedTar)), deployments.ErrDigest},
		"garbage behind the tar": {append(bytes.Clone(plain), "garbage"...),
			deployments.DigestOf(append(bytes.Clone(plain), "garbage"...)).String(), nil},
		"garbage behind the gzip": {append(bytes.Clone(packedTar), "garbage"...),
			deployments.DigestOf(append(bytes.Clone(packedTar), "garbage"...)).String(), nil},
		"nothing":               {nil, deployments.DigestOf(nil).String(), nil},
		"an archive of nothing": {make([]byte, 10240), deployments.DigestOf(make([]byte, 10240)).String(), nil},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			path := filepath.Join(t.TempDir(), "app.tar.gz")
			if err := os.WriteFile(path, c.data, 0o644); err != nil {
				t.Fatal(err)
			}
			releases := Open(filepath.Join(t.TempDir(), "app"), object.New(object.Config{}), nil)
			raw := []byte("manifest")
			p := deployments.Pointer{URL: "file:///m", Digest: deployments.DigestOf(raw)}
			m := &deployments.Manifest{Src: "file://" + path, Checksum: c.sum, DestMode: 0o755}
			_, err := releases.Stage(t.Context(), p, m, raw, StageOptions{})
			if err == nil || c.want != nil && !errors.Is(err, c.want) {
				t.Errorf("%v", err)
			}
			if left := append(treetest.List(t, releases.private()), treetest.List(t, releases.top())[1:]...); len(left) > 0 {
				t.Errorf("it leaves %q", left)
			}
		})
	}
}

// bomb is the header of a file of so many bytes.
func bomb(t testing.TB, size int64) []byte {
	var out bytes.Buffer
	z, err := zstd.NewWriter(&out, zstd.WithEncoderLevel(zstd.SpeedFastest))
	if err != nil {
		t.Fatal(err)
	}
	w := tar.NewWriter(z)
	if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: "zeros", Mode: 0o644, Size: size}); err != nil {
		t.Fatal(err)
	}
	w.Flush()
	z.Close() // cut off: nobody should read that far
	return out.Bytes()
}

func TestBombs(t *testing.T) {
	t.Parallel()
	if _, err := unpackBytes(t, "bomb.tar.zst", bomb(t, 1<<40)); err == nil || !strings.Contains(err.Error(), "bomb") {
		t.Errorf("a terabyte of zeros: %v", err)
	}
	dir, err := unpackBytes(t, "zeros.tar.zst", zst(t, tarOf(t, file("zeros", string(make([]byte, 1<<20))))))
	if err != nil || size(t, filepath.Join(dir, "zeros")) != 1<<20 {
		t.Errorf("a MiB of zeros: %v", err)
	}
	window := []byte{0x28, 0xb5, 0x2f, 0xfd, 0x00, 0xf8, 0, 0, 0} // a frame that wants a window of 2 TB
	if _, err := unpackBytes(t, "window.tar.zst", window); err == nil || !strings.Contains(err.Error(), "window") {
		t.Errorf("a huge window: %v", err)
	}
}

// newExtractor unpacks into a directory of its own.
func newExtractor(t testing.TB) *extractor {
	t.Helper()
	root, err := os.OpenRoot(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { root.Close() })
	return &extractor{
		ctx:      t.Context(),
		root:     root,
		manifest: &deployments.Manifest{},
		left:     freeGrowth,
		links:    map[string]bool{},
		dirs:     map[string]*attributes{},
	}
}

func (x *extractor) bytes(data []byte) error {
	return x.archive(bufio.NewReader(bytes.NewReader(data)), "app")
}

// manyDirs returns the headers of n directories.
func manyDirs(n int) (all []tar.Header) {
	for i := range n {
		all = append(all, special(tar.TypeDir, fmt.Sprintf("d%d/", i), ""))
	}
	return all
}

// What a small archive makes grow is bounded, whatever it is.
func TestWhatGrowsIsBounded(t *testing.T) {
	t.Parallel()
	const left = 1 << 20
	deep := strings.Repeat("d/", 100)
	record := tar.Header{
		Typeflag:   tar.TypeReg,
		Name:       "x",
		Mode:       0o644,
		PAXRecords: map[string]string{"KEDGE.x": strings.Repeat("x", 1<<19)},
	}
	for name, c := range map[string]struct {
		data []byte
		set  func(x *extractor)
		want error
	}{
		"a file":                   {tarOf(t, file("x", strings.Repeat("x", left+1))), nil, errBomb},
		"files together":           {tarOf(t, file("x", strings.Repeat("x", left/2)), file("y", strings.Repeat("y", left/2+1))), nil, errBomb},
		"as much as there may be":  {tarOf(t, file("x", strings.Repeat("x", left))), nil, nil},
		"zeros behind the end":     {zst(t, append(tarOf(t, file("x", "x")), make([]byte, left)...)), nil, errBomb},
		"records of headers":       {gz(tarOf(t, record, record, record)), nil, errBomb},
		"a single file":            {gz([]byte(strings.Repeat("x", left+1))), nil, errBomb},
		"entries":                  {tarOf(t, file("x", "x"), file("y", "y")), func(x *extractor) { x.count = maxTarEntries - 1 }, errEntries},
		"the last entry":           {tarOf(t, file("x", "x")), func(x *extractor) { x.count = maxTarEntries - 1 }, nil},
		"directories of a name":    {tarOf(t, file(deep+"x", "x")), func(x *extractor) { x.count = maxTarEntries - 100 }, errEntries},
		"directories of two names": {tarOf(t, file(deep+"x", "x"), file(deep+"y", "x")), func(x *extractor) { x.count = maxTarEntries - 102 }, nil},
		"directories of the disk":  {tarOf(t, manyDirs(left/dirSize+1)...), nil, errBomb},
		"as many as there may be":  {tarOf(t, manyDirs(left/dirSize)...), nil, nil},
		"one directory over again": {tarOf(t, slices.Repeat(manyDirs(1), left/dirSize+1)...), nil, nil},
		"parents that have none":   {tarOf(t, file(deep+"x", "x")), func(x *extractor) { x.left = 99 * dirSize }, errBomb},
		"names of directories":     {tarOf(t, special(tar.TypeDir, "dir/", "")), func(x *extractor) { x.names = maxNames - 2 }, errNames},
		"names of links":           {tarOf(t, special(tar.TypeSymlink, "link", "x")), func(x *extractor) { x.names = maxNames - 3 }, errNames},
		"names of parents":         {tarOf(t, file("dir/x", "")), func(x *extractor) { x.names = maxNames - 2 }, errNames},
		"the last name":            {tarOf(t, file("dir/x", "")), func(x *extractor) { x.names = maxNames - 3 }, nil},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			x := newExtractor(t)
			x.left = left
			if c.set != nil {
				c.set(x)
			}
			if err := x.bytes(c.data); !errors.Is(err, c.want) {
				t.Errorf("%v, want %v", err, c.want)
			}
		})
	}
}

// A header's records are not kept in memory: of a directory they may be a MiB, and shrink to nothing in the archive.
func TestRecordsAreNotKept(t *testing.T) {
	const n, each = 16, 1<<20 - 4096
	var headers []tar.Header
	for i := range n {
		records := map[string]string{"KEDGE.x": strings.Repeat("x", each)}
		dir, link := fmt.Sprintf("%0150d", i), fmt.Sprintf("link%0150d", i) // long enough to be records as well
		headers = append(headers, tar.Header{Typeflag: tar.TypeDir, Name: dir, Mode: 0o755, PAXRecords: records},
			tar.Header{Typeflag: tar.TypeSymlink, Name: link, Linkname: "x", PAXRecords: records},
			tar.Header{Typeflag: tar.TypeReg, Name: "above" + dir + "/x", Mode: 0o644, PAXRecords: records})
	}
	data := zst(t, tarOf(t, headers...))
	headers = nil
	live := func() uint64 {
		var m runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&m)
		return m.HeapAlloc
	}
	x := newExtractor(t)
	before := live()
	if err := x.bytes(data); err != nil {
		t.Fatal(err)
	}
	if now := live(); now > before+n*each/4 {
		t.Errorf("an archive of %d bytes takes %d of memory when it is read", len(data), now-before)
	}
	runtime.KeepAlive(x)
}

// A server that cuts the connection costs requests, not the deployment.
func TestArchiveOverABadLine(t *testing.T) {
	t.Parallel()
	data := tarOf(t, file("noise", treetest.Noise(3, 3<<20)))
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		http.ServeContent(&cutWriter{ResponseWriter: w, left: 1 << 20}, r, "app.tar", time.Time{}, bytes.NewReader(data))
	}))
	t.Cleanup(server.Close)
	dir := t.TempDir()
	m := &deployments.Manifest{Src: server.URL + "/app.tar", Checksum: deployments.DigestOf(data).String()}
	if err := Unpack(t.Context(), object.New(object.Config{}), m, dir, StageOptions{}); err != nil {
		t.Fatal(err)
	}
	if got := size(t, filepath.Join(dir, "noise")); got != 3<<20 {
		t.Errorf("the file has %d bytes", got)
	}
}

// cutWriter ends the connection after some bytes.
type cutWriter struct {
	http.ResponseWriter
	left int
}

func (w *cutWriter) Write(data []byte) (int, error) {
	n, err := w.ResponseWriter.Write(data[:min(len(data), w.left)])
	if w.left -= n; w.left == 0 && len(data) > n {
		panic(http.ErrAbortHandler)
	}
	return n, err
}

// FuzzExtract: whatever the bytes, nothing is written outside of the tree, and what is in it is what a release may
// hold.
func FuzzExtract(f *testing.F) {
	f.Add(goodTar(f))
	f.Add(gz(goodTar(f)))
	f.Add(zst(f, goodTar(f)))
	f.Add(compressed(f, "bzip2", goodTar(f)))
	f.Add(compressed(f, "xz", goodTar(f)))
	for _, h := range hostile(f) {
		f.Add(h.data)
		f.Add(gz(h.data))
	}
	client := object.New(object.Config{})
	f.Fuzz(func(t *testing.T, data []byte) {
		root := fuzzlimit.Dir(t)
		path := filepath.Join(root, "app")
		if err := os.WriteFile(path, data, 0o644); err != nil {
			t.Fatal(err)
		}
		outer := filepath.Join(root, "outer")
		dir := filepath.Join(outer, "tree")
		if err := os.Mkdir(outer, 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.Mkdir(dir, 0o700); err != nil {
			t.Fatal(err)
		}
		m := &deployments.Manifest{Src: "file://" + path, Checksum: deployments.DigestOf(data).String()}
		from := object.Source{Client: client, URL: m.Src}
		var err error
		fuzzlimit.Run(t, data, func() { err = extract(t.Context(), from, m, dir, StageOptions{}, nil) })
		if outside := append(treetest.List(t, root), treetest.List(t, outer)...); len(outside) != 3 {
			t.Fatalf("it wrote outside of the tree: %q", outside)
		}
		if err == nil {
			if _, err := indexOfTree(t.Context(), dir); err != nil {
				t.Fatalf("it unpacked what no release may hold: %v", err)
			}
		}
		if err := safefs.RemoveTree(dir); err != nil {
			t.Fatal(err)
		}
	})
}

// A file that is no archive is a release of one file, but rsync doesn't empty a directory of many for it.
func TestASingleFileInThePlaceOfMany(t *testing.T) {
	t.Parallel()
	store := t.TempDir()
	page := []byte("<html>not found</html>\n")
	src := filepath.Join(store, "page.html")
	treetest.WriteFile(t, src, string(page))
	for name, c := range map[string]struct {
		there    []string
		strategy deployments.Strategy
		refused  bool
	}{
		"nothing":                  {nil, deployments.StrategyRsync, false},
		"a directory of many":      {[]string{"a", "b"}, deployments.StrategyRsync, true},
		"the release before":       {[]string{"page.html", "made", "other"}, deployments.StrategyRsync, false},
		"one file":                 {[]string{"app-1.2"}, deployments.StrategyRsync, false},
		"where the old tree stays": {[]string{"a", "b"}, deployments.StrategyRelease, false},
	} {
		dest := t.TempDir()
		for _, file := range c.there {
			treetest.WriteFile(t, filepath.Join(dest, file), "old")
		}
		m := &deployments.Manifest{
			Src:      "file://" + src,
			Checksum: deployments.DigestOf(page).String(),
			Dest:     dest,
			Strategy: c.strategy,
			DestMode: 0o755,
		}
		err := Unpack(t.Context(), object.New(object.Config{}), m, t.TempDir(), StageOptions{})
		if (err != nil) != c.refused || err != nil && !strings.Contains(err.Error(), "sync_strategy: release") {
			t.Errorf("%s: %v", name, err)
		}
	}
}
