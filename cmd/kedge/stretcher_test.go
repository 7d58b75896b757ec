package main

import (
	"archive/tar"
	"bytes"
	"crypto/md5"
	"crypto/sha1"
	"crypto/sha256"
	"crypto/sha512"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"kedge/artifact/objecttest"
	"kedge/deployments/tooltest"
)

// oldCase is a manifest and an archive as people have them for stretcher, and how the two are used.
type oldCase struct {
	name string
	// manifest's words in capitals are replaced: SRC, SUM (SHA-256), SUMMD5, SUMSHA1, SUM512, SUMUPPER, DEST, HOOKS,
	// DIR. Without src and dest it gets those of the archive.
	manifest string
	archive  archive
	// before makes what is there before, in the case's directory.
	before string // a shell script
	env    []string
	// src is the archive's place: "s3" (the default), "file", "http", or a whole URL.
	src string
	// input is what it reads; URL is replaced. Default: URL and a line feed.
	input string
	// twice has the second archive deployed after it.
	then *archive
	// byHand says that it is of how kedge run is asked, which agents aren't.
	byHand bool
	// agent names the entry of that file that says why an agent's result is another than kedge run's.
	agent string
	// differs names the entry of deployments/migrating/differences.md that says why kedge's result is another.
	differs string
}

// outcome is what one run leaves.
type outcome struct {
	Failed bool     `json:"failed,omitempty"`
	Tree   []string `json:"tree,omitempty"`
	Hooks  []string `json:"hooks,omitempty"`
}

// entry is a member of an archive: "d MODE NAME", "f MODE NAME CONTENT", "l NAME TARGET", "h NAME TARGET", "p NAME"
// (a FIFO), "c NAME" (a device), "g" (a global header). MODE may be followed by :UID:GID, or by :USER:GROUP, as in
// 644:1:1.
type archive struct {
	entries []string
	name    string   // app.tar by default
	filter  []string // a program that the tar goes through
	raw     string   // in place of a tar; with filter's output
	format  tar.Format
	cut     int // bytes that are left; 0: all
	more    string
}

// bytes makes the archive's bytes.
func (a archive) bytes(t *testing.T) []byte {
	t.Helper()
	data := []byte(a.raw)
	if a.raw == "" {
		var b bytes.Buffer
		w := tar.NewWriter(&b)
		for _, e := range a.entries {
			h, content := member(t, e)
			if h.Format = a.format; h.Typeflag == tar.TypeXGlobalHeader {
				h.Format = tar.FormatPAX
			}
			if err := w.WriteHeader(h); err != nil {
				t.Fatalf("%s: %v", e, err)
			}
			if _, err := w.Write([]byte(content)); err != nil {
				t.Fatal(err)
			}
		}
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
		data = b.Bytes()
	}
	if len(a.filter) > 0 {
		cmd := exec.Command(a.filter[0], a.filter[1:]...)
		cmd.Stdin = bytes.NewReader(data)
		out, err := cmd.Output()
		if err != nil {
			t.Fatalf("%s: %v", a.filter, err)
		}
		data = out
	}
	if a.cut > 0 {
		data = data[:a.cut]
	}
	return append(data, a.more...)
}

func member(t *testing.T, e string) (*tar.Header, string) {
	t.Helper()
	words := strings.SplitN(e, " ", 4)
	words = append(words, make([]string, 4-len(words))...)
	h := &tar.Header{ModTime: time.Unix(1700000000, 0), Mode: 0o644}
	var content string
	switch words[0] {
	case "d", "f":
		mode, owner, owned := strings.Cut(words[1], ":")
		if _, err := fmt.Sscanf(mode, "%o", &h.Mode); err != nil {
			t.Fatalf("%s: %v", e, err)
		}
		if owned {
			user, group, _ := strings.Cut(owner, ":")
			if _, err := fmt.Sscanf(user+" "+group, "%d %d", &h.Uid, &h.Gid); err != nil {
				h.Uid, h.Gid, h.Uname, h.Gname = 4321, 4321, user, group
			}
		}
		h.Typeflag, h.Name, content = tar.TypeDir, words[2], ""
		if words[0] == "f" {
			h.Typeflag, content = tar.TypeReg, words[3]
		}
	case "l":
		h.Typeflag, h.Name, h.Linkname = tar.TypeSymlink, words[1], words[2]
	case "h":
		h.Typeflag, h.Name, h.Linkname = tar.TypeLink, words[1], words[2]
	case "p":
		h.Typeflag, h.Name = tar.TypeFifo, words[1]
	case "c":
		h.Typeflag, h.Name, h.Devmajor, h.Devminor = tar.TypeChar, words[1], 1, 3
	case "g":
		h = &tar.Header{Typeflag: tar.TypeXGlobalHeader, Name: "pax_global_header", PAXRecords: map[string]string{"comment": strings.Repeat("a", 40)}}
	default:
		t.Fatalf("entry %q", e)
	}
	h.Size = int64(len(content))
	return h, content
}

// stretcherRun is one run of a case by one of the two programs, in a directory of its own.
type stretcherRun struct {
	c        oldCase
	dir      string
	s3       *objecttest.Server
	key      string // below which its objects lie in S3
	http     string // URL that serves dir; redirect leads there
	redirect string
	command  func(env []string) *exec.Cmd
	log      string
}

// do runs the case, and tells what it left.
func (r *stretcherRun) do(t *testing.T) outcome {
	t.Helper()
	r.prepare(t)
	var o outcome
	for i, a := range []*archive{&r.c.archive, r.c.then} {
		if a == nil {
			continue
		}
		manifest := r.publish(t, *a)
		cmd := r.command(append([]string{
			"PATH=" + os.Getenv("PATH"), "HOME=" + r.dir, "TMPDIR=" + filepath.Join(r.dir, "tmp"), "LC_ALL=C", "RUN=" + fmt.Sprint(i+1),
		}, strings.Split(strings.ReplaceAll(strings.Join(r.c.env, "\x00"), "DIR", r.dir), "\x00")...))
		cmd.Dir = r.dir
		input := r.c.input
		if input == "" {
			input = "URL\n"
		}
		cmd.Stdin = strings.NewReader(strings.NewReplacer(
			"URL64", base64.StdEncoding.EncodeToString([]byte(manifest)), "URL", manifest).Replace(input))
		out, err := cmd.CombinedOutput()
		r.log += string(out)
		o.Failed = err != nil
		if err != nil && !errors.As(err, new(*exec.ExitError)) {
			t.Fatal(err)
		}
	}
	o.Tree, o.Hooks = describeTree(t, r.srv()), r.hooks()
	return o
}

func (r *stretcherRun) srv() string { return filepath.Join(r.dir, "srv") }

// prepare makes what is there before.
func (r *stretcherRun) prepare(t *testing.T) {
	t.Helper()
	if err := errors.Join(os.MkdirAll(r.srv(), 0o755), os.MkdirAll(filepath.Join(r.dir, "tmp"), 0o755)); err != nil {
		t.Fatal(err)
	}
	if r.c.before == "" {
		return
	}
	cmd := exec.Command("sh", "-ec", r.c.before)
	cmd.Dir = r.dir
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("before: %v\n%s", err, out)
	}
}

// hooks returns what the case's commands have noted so far.
func (r *stretcherRun) hooks() []string {
	data, err := os.ReadFile(filepath.Join(r.dir, "hooks"))
	if err != nil {
		return nil
	}
	return strings.Split(strings.TrimRight(strings.ReplaceAll(string(data), r.dir, "DIR"), "\n"), "\n")
}

// publish puts archive and manifest where they belong, and returns the manifest's URL.
func (r *stretcherRun) publish(t *testing.T, a archive) string {
	t.Helper()
	data := a.bytes(t)
	name := a.name
	if name == "" {
		name = "app.tar"
	}
	write := func(base, name string, data []byte) {
		file := filepath.Join(base, name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(file), 0o755), os.WriteFile(file, data, 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	write(r.dir, name, data)
	write(filepath.Join(r.s3.Dir(), r.key), name, data) // what the server keeps of an object that was put is its bytes and a few attributes
	src := r.s3.URL(r.key + "/" + name)
	switch r.c.src {
	case "", "s3":
	case "file":
		src = "file://" + filepath.Join(r.dir, name)
	case "http":
		src = r.http + "/" + url.PathEscape(name)
	default:
		src = strings.NewReplacer("HTTP", r.http, "REDIRECT", r.redirect, "DIR", r.dir, "KEY", r.key).Replace(r.c.src)
	}
	text := r.c.manifest
	if !regexp.MustCompile(`(?m)^\x{feff}?(src|"src"|\{|SRCLESS|<)`).MatchString(text) && text != "" {
		text = "src: SRC\nchecksum: SUM\n" + text
		if !regexp.MustCompile(`(?m)^dest:`).MatchString(text) {
			text = "dest: DEST\n" + text
		}
	}
	sum256, sum1, sum5, sum512 := sha256.Sum256(data), sha1.Sum(data), md5.Sum(data), sha512.Sum512(data)
	text = strings.NewReplacer("SRCLESS\n", "", "SRC", src, "SUMMD5", hex.EncodeToString(sum5[:]), "SUMSHA1", hex.EncodeToString(sum1[:]),
		"SUM512", hex.EncodeToString(sum512[:]), "SUMUPPER", strings.ToUpper(hex.EncodeToString(sum256[:])),
		"SUM", hex.EncodeToString(sum256[:]), "DEST", filepath.Join(r.dir, "srv", "app"),
		"HOOKS", filepath.Join(r.dir, "hooks"), "DIR", r.dir).Replace(text)
	write(r.dir, "manifest.yml", []byte(text))
	write(filepath.Join(r.s3.Dir(), r.key), "manifest.yml", []byte(text))
	return r.s3.URL(r.key + "/manifest.yml")
}

// describeTree lists what lies below dir by mode, owner, path, and content or target, but for what kedge keeps
// beside a dest.
func describeTree(t *testing.T, dir string) []string {
	t.Helper()
	var lines []string
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if rel, _ := filepath.Rel(dir, path); rel == "." || strings.Contains(filepath.Base(rel), ".kedge-") {
			return nil
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		st := info.Sys().(*syscall.Stat_t)
		rel, err := filepath.Rel(dir, path)
		if err != nil {
			return err
		}
		line := fmt.Sprintf("%s %d:%d %q", info.Mode(), st.Uid, st.Gid, rel)
		switch {
		case info.Mode().IsRegular():
			data, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			if len(data) > 60 {
				sum := sha256.Sum256(data)
				line += fmt.Sprintf(" %d bytes %x", len(data), sum[:6])
			} else {
				line += fmt.Sprintf(" %q", data)
			}
			if st.Nlink > 1 {
				line += fmt.Sprintf(" links=%d", st.Nlink)
			}
		case info.Mode()&fs.ModeSymlink != 0:
			to, err := os.Readlink(path)
			if err != nil {
				return err
			}
			line += " -> " + to
		}
		lines = append(lines, line)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	parent := filepath.Dir(dir)
	for i := range lines {
		lines[i] = strings.ReplaceAll(lines[i], parent, "DIR")
	}
	slices.Sort(lines)
	return lines
}

const recordedOutcomes = "testdata/stretcher.json"

// differenceList is where each way in which kedge differs from stretcher is named, and given a reason.
const differenceList = "../../deployments/migrating/differences.md"

// TestStretchersTable runs manifests and archives of every kind that stretcher takes, and compares what kedge run
// leaves with what stretcher's own program left: files by type, mode, owner, content and link, hooks by order and
// environment, and the exit code. Then agents converge to the same manifests, and are compared with kedge run.
//
// What stretcher's program left was recorded, in testdata/stretcher.json. KEDGE_STRETCHER names a program of
// stretcher's to run beside kedge: what it leaves is compared with what was recorded, or takes its place if
// KEDGE_RECORD is set.
func TestStretchersTable(t *testing.T) {
	t.Parallel()
	tooltest.Path(t, "versitygw")
	tooltest.NeedRoot(t) // to compare the archives' owners
	var recorded map[string]outcome
	data, err := os.ReadFile(recordedOutcomes)
	if err == nil {
		err = json.Unmarshal(data, &recorded)
	}
	if err != nil && os.Getenv("KEDGE_RECORD") == "" {
		t.Fatal(err)
	}
	reasons := readDifferences(t)

	s3 := objecttest.Start(t)
	root := t.TempDir()
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
		if rest, ok := strings.CutPrefix(q.URL.Path, "/redirect/"); ok {
			http.Redirect(w, q, "/"+rest, http.StatusFound)
			return
		}
		http.FileServer(http.Dir(root)).ServeHTTP(w, q)
	}))
	t.Cleanup(server.Close)
	link := filepath.Join(t.TempDir(), "stretcher")
	if err := os.Symlink(releasedProgram(t), link); err != nil {
		t.Fatal(err)
	}
	programs := map[string]func(env []string) *exec.Cmd{"kedge": func(env []string) *exec.Cmd {
		cmd := exec.Command(link)
		cmd.Env = append(env, s3.Env()...)
		return cmd
	}}
	if peer := os.Getenv("KEDGE_STRETCHER"); peer != "" {
		programs["stretcher"] = func(env []string) *exec.Cmd {
			cmd := exec.Command(peer)
			cmd.Env = append(env, s3.Env()...)
			return cmd
		}
	}

	cases := oldCases()
	if len(cases) < 120 {
		t.Errorf("%d cases, want at least 120", len(cases))
	}
	var mu sync.Mutex
	used := map[string]bool{}
	now, ran := map[string]outcome{}, map[string]outcome{}
	t.Run("cases", func(t *testing.T) {
		for i, c := range cases {
			used[c.differs] = true
			if c.differs != "" && reasons[c.differs] == "" {
				t.Errorf("%s: %s has no entry %q", c.name, differenceList, c.differs)
			}
			t.Run(c.name, func(t *testing.T) {
				t.Parallel()
				got := map[string]outcome{}
				var log string
				for name, command := range programs {
					key := fmt.Sprintf("%s-%d", name, i)
					r := stretcherRun{c: c, dir: filepath.Join(root, key), s3: s3, key: key, http: server.URL + "/" + key,
						redirect: server.URL + "/redirect/" + key, command: command}
					got[name] = r.do(t)
					if name == "kedge" {
						log = r.log
					}
				}
				want, known := recorded[c.name]
				if live, ok := got["stretcher"]; ok {
					if os.Getenv("KEDGE_RECORD") != "" {
						want, known = live, true
					} else if diff := compareOutcomes(live, want); diff != "" {
						t.Errorf("stretcher's program leaves something else than was recorded of it:\n%s", diff)
					}
				}
				if !known {
					t.Fatalf("it isn't recorded what stretcher leaves: see KEDGE_STRETCHER and KEDGE_RECORD")
				}
				mu.Lock()
				now[c.name], ran[c.name] = want, got["kedge"]
				mu.Unlock()
				diff := compareOutcomes(got["kedge"], want)
				switch {
				case diff != "" && c.differs == "":
					t.Errorf("kedge (+) leaves something else than stretcher (-):\n%s\nkedge's log:\n%s", diff, log)
				case diff == "" && c.differs != "":
					t.Errorf("it doesn't differ any more: %s", c.differs)
				case diff != "":
					t.Logf("%s:\n%s", c.differs, diff)
				}
			})
		}
	})
	t.Run("agents", func(t *testing.T) {
		runs := map[*stretcherRun]outcome{} // and what kedge run left
		for i, c := range cases {
			used[c.agent] = true
			if want, ok := ran[c.name]; ok && !c.byHand {
				key := fmt.Sprintf("agent-%d", i)
				r := &stretcherRun{c: c, dir: filepath.Join(root, key), s3: s3, key: key, http: server.URL + "/" + key,
					redirect: server.URL + "/redirect/" + key}
				runs[r] = want
			}
		}
		convergeStretchers(t, s3, runs, reasons)
	})
	for code := range reasons {
		if !used[code] {
			t.Errorf("%s: no case shows %q", differenceList, code)
		}
	}
	if os.Getenv("KEDGE_RECORD") != "" {
		data, err := json.MarshalIndent(now, "", " ")
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(recordedOutcomes, append(data, '\n'), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

// readDifferences reads the list's table: | `code` | what … |.
func readDifferences(t *testing.T) map[string]string {
	t.Helper()
	data, err := os.ReadFile(differenceList)
	if err != nil {
		t.Fatal(err)
	}
	found := map[string]string{}
	for _, m := range regexp.MustCompile("(?m)^\\| `([a-z-]+)` \\|(.+)\\|$").FindAllStringSubmatch(string(data), -1) {
		if columns := strings.Split(m[2], "|"); len(columns) == 3 && strings.TrimSpace(columns[2]) != "" {
			found[m[1]] = m[2]
		} else {
			t.Errorf("%s: %s needs what stretcher does, what kedge does, and a reason", differenceList, m[1])
		}
	}
	return found
}

// compareOutcomes shows what only one of two runs left; empty: nothing.
func compareOutcomes(got, want outcome) string {
	var b strings.Builder
	if got.Failed != want.Failed {
		fmt.Fprintf(&b, "- failed: %v\n+ failed: %v\n", want.Failed, got.Failed)
	}
	have, wanted := lineSet(got.Tree), lineSet(want.Tree)
	for _, line := range slices.Sorted(maps.Keys(wanted)) {
		if !have[line] {
			fmt.Fprintf(&b, "- %s\n", line)
		}
	}
	for _, line := range slices.Sorted(maps.Keys(have)) {
		if !wanted[line] {
			fmt.Fprintf(&b, "+ %s\n", line)
		}
	}
	if !slices.Equal(got.Hooks, want.Hooks) {
		fmt.Fprintf(&b, "- hooks: %q\n+ hooks: %q\n", want.Hooks, got.Hooks)
	}
	return b.String()
}

func lineSet(lines []string) map[string]bool {
	set := map[string]bool{}
	for _, l := range lines {
		set[l] = true
	}
	return set
}
