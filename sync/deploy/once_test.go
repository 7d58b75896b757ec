package deploy

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"kedge/artifact"
	"kedge/artifact/object"
	"kedge/deployments"
	"kedge/deployments/fuzzlimit"
)

func TestParseInput(t *testing.T) {
	t.Parallel()
	const url = "s3://bucket/manifest.yml"
	const payload = "czM6Ly9idWNrZXQvbWFuaWZlc3QueW1s" // url
	for name, test := range map[string]struct {
		in, index string
		url, err  string
	}{
		"raw":                   {in: url + "\n", url: url},
		"raw without a newline": {in: url, url: url},
		"raw with CRLF":         {in: "\ufeff" + url + "\r\n", url: url},
		"first line counts":     {in: url + "\nfile:///other\n", url: url},
		"an event":              {in: `[{"ID":"1","Name":"deploy","Payload":"` + payload + `","LTime":2}]`, url: url},
		"the last event":        {in: `[{"ID":"1","Payload":"Zm9v"},{"ID":"2","Payload":"` + payload + `"}]`, index: "3", url: url},
		"no events":             {in: "[]\n"},
		"no events, watched":    {in: "[]", index: "1"},
		"nothing, watched":      {in: "", index: "1"},
		"null, watched":         {in: "null\n", index: "1"},
		"empty":                 {in: "\n", err: "is empty"},
		"raw, watched":          {in: url, index: "1", err: "not Consul's JSON"},
		"not base64":            {in: `[{"ID":"1","Payload":"%%"}]`, err: "not Consul's JSON"},
		"no payload":            {in: `[{"ID":"abc","Payload":null}]`, err: `event "abc" has no payload`},
		"cut off":               {in: `[{"ID":"1"`, err: "not Consul's JSON"},
		"endless":               {in: strings.Repeat("x", maxInput+1), err: "more than"},
		"no more than one list": {in: `[{"ID":"1","Payload":"` + payload + `"}] rest`, url: url},
	} {
		got, err := ParseInput(strings.NewReader(test.in), func(name string) string { return map[string]string{"CONSUL_INDEX": test.index}[name] })
		if got != test.url || (err == nil) != (test.err == "") || err != nil && !strings.Contains(err.Error(), test.err) {
			t.Errorf("%s: %q, %v; want %q, %q", name, got, err, test.url, test.err)
		}
	}
}

func FuzzParseInput(f *testing.F) {
	f.Add("s3://b/k\n", "")
	f.Add(`[{"ID":"1","Payload":"Zm9v"}]`, "1")
	f.Fuzz(func(t *testing.T, in, index string) {
		var url string
		var err error
		fuzzlimit.Run(t, in, func() {
			url, err = ParseInput(strings.NewReader(in), func(string) string { return index })
		})
		if err != nil && url != "" {
			t.Errorf("%q and %v", url, err)
		}
		if strings.TrimSpace(url) != url {
			t.Errorf("%q has white space around it", url)
		}
	})
}

// tree lists what lies below dir: mode, path, and content or the link's target.
func tree(t *testing.T, dir string) []string {
	t.Helper()
	dir, err := filepath.EvalSymlinks(dir)
	if os.IsNotExist(err) {
		return nil
	}
	var lines []string
	err = filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(dir, path)
		if err != nil {
			return err
		}
		line := fmt.Sprintf("%s %s", info.Mode(), rel)
		switch {
		case info.Mode().IsRegular():
			data, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			line += " " + string(data)
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
	return lines
}

// TestStretchersManifests deploys manifests as people wrote them for stretcher. What it expects is what stretcher
// does, but for the differences that the package comment lists.
func TestStretchersManifests(t *testing.T) {
	t.Parallel()
	const all = `
commands:
  pre:
    - echo pre >> HOOKS
  post:
    - echo post >> HOOKS
  success:
    - echo success >> HOOKS; cat > /dev/null
    - grep -q 'running command' && echo told >> HOOKS
  failure:
    - echo failure >> HOOKS; grep -qi 'failed' && echo told >> HOOKS
`
	entries := []entry{
		{name: "bin", mode: fs.ModeDir | 0o755}, {name: "bin/run", data: "#!/bin/sh", mode: 0o750}, {name: "conf", data: "x=1", mode: 0o640},
		{name: "current", link: "bin"}, {name: "exclude.list", data: "*.log\n", mode: 0o644},
	}
	want := []string{"-rw-r----- conf x=1", "-rw-r--r-- exclude.list *.log\n", "-rwxr-x--- bin/run #!/bin/sh", "Lrwxrwxrwx current -> bin", "drwxr-xr-x .", "drwxr-xr-x bin"}
	mode := func(top string) []string {
		out := slices.Clone(want)
		out[slices.Index(out, "drwxr-xr-x .")] = top + " ."
		slices.Sort(out)
		return out
	}
	with := func(more ...string) []string {
		out := append(slices.Clone(want), more...)
		slices.Sort(out)
		return out
	}
	old := func(w *world) { // what lay at dest before
		for name, data := range map[string]string{"app.pid": "1", "app.log": "log", "rubbish": "r"} {
			if err := os.MkdirAll(w.dest(), 0o700); err != nil {
				w.t.Fatal(err)
			}
			if err := os.WriteFile(filepath.Join(w.dest(), name), []byte(data), 0o600); err != nil {
				w.t.Fatal(err)
			}
		}
	}
	oldTree := []string{"-rw------- app.log log", "-rw------- app.pid 1", "-rw------- rubbish r", "drwx------ ."}
	hooks := []string{"pre", "post", "success", "told"}
	for name, test := range map[string]struct {
		manifest string // SRC, DEST, HOOKS and SUM* are replaced
		before   func(*world)
		tree     []string
		hooks    []string
		err      string
	}{
		"all defaults":     {manifest: "src: SRC\nchecksum: SUM256\ndest: DEST\n", tree: want},
		"over an old tree": {manifest: "src: SRC\nchecksum: SUM256\ndest: DEST\n" + all, before: old, tree: want, hooks: hooks},
		"excludes": {manifest: "src: SRC\nchecksum: SUM256\ndest: DEST\nexcludes:\n  - '*.pid'\n  - rubbish\n" + all, before: old,
			tree: with("-rw------- app.pid 1", "-rw------- rubbish r"), hooks: hooks},
		"exclude_from":                                  {manifest: "src: SRC\nchecksum: SUM256\ndest: DEST\nexclude_from: exclude.list\n", before: old, tree: with("-rw------- app.log log")},
		"rsync by name, dest with a slash":              {manifest: "src: SRC\nchecksum: SUM256\ndest: DEST/\nsync_strategy: rsync\n", tree: want},
		"dest_mode 0711":                                {manifest: "src: SRC\nchecksum: SUM256\ndest: DEST\ndest_mode: 0711\n", tree: mode("drwx--x--x")},
		"dest_mode 755 that stretcher reads as decimal": {manifest: "src: SRC\nchecksum: SUM256\ndest: DEST\ndest_mode: 755\n", tree: mode("drwxr-xr-x")},
		"md5":                             {manifest: "src: SRC\nchecksum: SUMMD5\ndest: DEST\n", tree: want},
		"sha1":                            {manifest: "src: SRC\nchecksum: SUMSHA1\ndest: DEST\n", tree: want},
		"sha512":                          {manifest: "src: SRC\nchecksum: SUM512\ndest: DEST\n", tree: want},
		"upper case":                      {manifest: "src: SRC\nchecksum: SUMUPPER\ndest: DEST\n", tree: want},
		"mv":                              {manifest: "src: SRC\nchecksum: SUM256\ndest: DEST\nsync_strategy: mv\n" + all, tree: want, hooks: hooks},
		"mv over an old tree":             {manifest: "src: SRC\nchecksum: SUM256\ndest: DEST\nsync_strategy: mv\n" + all, before: old, tree: oldTree, hooks: []string{"pre", "failure", "told"}, err: "exists"},
		"mv with the old tree moved away": {manifest: "src: SRC\nchecksum: SUM256\ndest: DEST\nsync_strategy: mv\ncommands: {pre: [mv DEST DEST.old]}\n", before: old, tree: want},
		"commands only":                   {manifest: strings.TrimSpace(all) + "\n", hooks: hooks},
		"commands only that fail":         {manifest: "commands:\n  pre: ['false', echo never >> HOOKS]\n  post: [echo never >> HOOKS]\n  failure: [echo failure >> HOOKS]\n", hooks: []string{"failure"}, err: "exit status 1"},
		"pre says something": {manifest: "src: SRC\nchecksum: SUM256\ndest: DEST\ncommands:\n  pre: [echo pre says hello]\n  success: ['grep -c \": pre says hello$\" >> HOOKS']\n",
			tree: want, hooks: []string{"1"}},
		"post fails": {manifest: "src: SRC\nchecksum: SUM256\ndest: DEST\ncommands:\n  post: [exit 3]\n  success: [echo never >> HOOKS]\n  failure: [echo failure >> HOOKS]\n",
			before: old, tree: want, hooks: []string{"failure"}, err: "exit status 3"},
		"success fails and that is no failure": {manifest: "src: SRC\nchecksum: SUM256\ndest: DEST\ncommands:\n  success: ['false', echo never >> HOOKS]\n  failure: [echo never >> HOOKS]\n", tree: want},
		"failure fails":                        {manifest: "commands:\n  pre: [exit 4]\n  failure: [echo one >> HOOKS; exit 1, echo never >> HOOKS]\n", hooks: []string{"one"}, err: "exit status 4"},
		"wrong checksum":                       {manifest: "src: SRC\nchecksum: 00000000000000000000000000000000\ndest: DEST\n" + all, before: old, tree: oldTree, hooks: []string{"failure", "told"}, err: "checksum"},
		"no archive":                           {manifest: "src: SRC.gone\nchecksum: SUM256\ndest: DEST\n" + all, before: old, tree: oldTree, hooks: []string{"failure", "told"}, err: "no such"},
		"env":                                  {manifest: "src: SRC\nchecksum: SUM256\ndest: '{{ env \"NO_SUCH_VARIABLE_HERE\" \"DEST\" }}'\n", tree: want},
		"must_env that isn't set":              {manifest: "src: '{{ must_env \"NO_SUCH_VARIABLE_HERE\" }}'\nchecksum: SUM256\ndest: DEST\n" + all, err: "NO_SUCH_VARIABLE_HERE"},
		"Consul's token is not for manifests":  {manifest: "src: '{{ must_env \"CONSUL_HTTP_TOKEN\" }}'\nchecksum: SUM256\ndest: DEST\n", err: "CONSUL_HTTP_TOKEN"},
		"no dest":                              {manifest: "src: SRC\nchecksum: SUM256\n", err: "dest"},
		"unknown strategy":                     {manifest: "src: SRC\nchecksum: SUM256\ndest: DEST\nsync_strategy: scp\n" + all, err: "scp"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			if test.before != nil {
				test.before(w)
			}
			src, sum := w.archive("app.tar", entries...)
			data, err := os.ReadFile(w.path("objects", "app.tar"))
			if err != nil {
				t.Fatal(err)
			}
			text := strings.NewReplacer("SRC", src, "DEST", w.dest(), "HOOKS", w.path("hooks"), "SUM256", sum, "SUMUPPER", strings.ToUpper(sum),
				"SUMMD5", md5Of(data), "SUMSHA1", sha1Of(data), "SUM512", sha512Of(data)).Replace(test.manifest)
			file := w.path("objects", "manifest.yml")
			if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
				t.Fatal(err)
			}
			err = w.once("file://" + file)
			if (err == nil) != (test.err == "") || err != nil && !strings.Contains(strings.ToLower(err.Error()), strings.ToLower(test.err)) {
				t.Errorf("got %v, want %q", err, test.err)
			}
			got := tree(t, w.dest())
			slices.Sort(got)
			if !slices.Equal(got, test.tree) {
				t.Errorf("dest:\n%s\nwant:\n%s", strings.Join(got, "\n"), strings.Join(test.tree, "\n"))
			}
			w.wantHooks(test.hooks...)
		})
	}
}

func (w *world) once(url string) error {
	log := slog.New(slog.NewTextHandler(w.t.Output(), nil))
	return Once(w.t.Context(), OneShot{URL: url, Node: "n1", Objects: object.New(object.Config{Log: log}), Log: log})
}

// TestErrorPageIsNoArchive is stretcher's worst trap: it deploys what a server says instead of the archive, if no
// checksum stops it, and parses an error page as a manifest.
func TestErrorPageIsNoArchive(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	page := []byte("<html>not found</html>\n")
	server := httptest.NewServer(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		if strings.HasSuffix(r.URL.Path, "manifest.yml") {
			sum := sha256.Sum256(page)
			fmt.Fprintf(rw, "src: http://%s/app.tar\nchecksum: %s\ndest: %s\n", r.Host, hex.EncodeToString(sum[:]), w.dest())
			return
		}
		rw.WriteHeader(http.StatusNotFound)
		rw.Write(page)
	}))
	t.Cleanup(server.Close)
	for _, url := range []string{server.URL + "/manifest.yml", server.URL + "/gone.yaml"} {
		if err := w.once(url); err == nil || !strings.Contains(err.Error(), "no such object") {
			t.Errorf("%s: %v", url, err)
		}
	}
	if exists(w.dest()) {
		t.Error("the error page was deployed")
	}
}

func TestOnceGoesBackAndTakesPointers(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	one := w.publish("1", nil)
	if err := w.once(one.String()); err != nil {
		t.Fatal(err)
	}
	if err := w.once(one.String()); err != nil {
		t.Fatal(err)
	}
	w.wantHooks("pre 1", "post 1", "success 1", "pre 1", "post 1", "success 1") // again, as stretcher does
	bad := w.publish("2", func(m *deployments.Manifest) { m.Commands.Post = []deployments.Command{{Run: "false"}} })
	if err := w.once(bad.URL); err == nil || !strings.Contains(err.Error(), "went back to") {
		t.Errorf("got %v", err)
	}
	w.wantVersion("1")
	w.wantHooks("pre 2", "post 1", "failure 2")
	bad.Digest[0]++
	if err := w.once(bad.String()); err == nil || !strings.Contains(err.Error(), "digest") {
		t.Errorf("a wrong digest: %v", err)
	}
	cut := one.String()
	err := w.once(cut[:len(cut)-1])
	if err == nil || !strings.Contains(err.Error(), "64 hexadecimal digits, this text has 63 bytes") {
		t.Errorf("a pointer that was cut off: %v", err)
	}
	if err := w.once("ftp://host/manifest"); err == nil || !strings.Contains(err.Error(), "scheme") {
		t.Errorf("an unknown scheme: %v", err)
	}
}

// Two runs at once, as user data and consul watch begin them at boot, leave a whole tree, and the one that waited
// does nothing.
func TestTwoRunsAtOnce(t *testing.T) {
	t.Parallel()
	for _, strategy := range []deployments.Strategy{deployments.StrategyRelease, deployments.StrategyRsync} {
		t.Run(string(strategy), func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			p := w.publish("1", func(m *deployments.Manifest) {
				m.Strategy = strategy
				m.Commands.Pre = append(m.Commands.Pre, deployments.Command{Run: "sleep 0.2"})
			})
			errs := make(chan error)
			for range 4 {
				go func() {
					c := w.config()
					errs <- Once(t.Context(), OneShot{URL: p.URL, Node: "n1", Objects: c.Objects, Log: c.Log})
				}()
			}
			for range 4 {
				if err := <-errs; err != nil {
					t.Error(err)
				}
			}
			w.wantVersion("1")
			w.wantHooks("pre 1", "post 1", "success 1")
			// One that comes later has been asked anew.
			c := w.config()
			if err := Once(t.Context(), OneShot{URL: p.URL, Node: "n1", Objects: c.Objects, Log: c.Log}); err != nil {
				t.Error(err)
			}
			w.wantHooks("pre 1", "post 1", "success 1")
		})
	}
}

// A run waits for an agent that deploys to the same dest, and the other way round.
func TestRunBesideAnAgent(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	u := w.open(nil)
	one, two := w.publish("1", nil), w.publish("2", nil)
	ran := make(chan error, 1)
	u.at = func(point string) {
		if point == "before switch" && u.j.Deployment.Release == one {
			go func() {
				c := w.config()
				ran <- Once(t.Context(), OneShot{URL: two.String(), Node: "n1", Objects: c.Objects, Log: c.Log})
			}()
		}
		if point == "before tidy" {
			select {
			case err := <-ran:
				t.Errorf("it didn't wait: %v", err)
			default:
			}
		}
	}
	w.deploy(u, one)
	if err := <-ran; err != nil {
		t.Error(err)
	}
	w.wantVersion("2")
	w.wantHooks("pre 1", "post 1", "success 1", "pre 2", "post 2", "success 2")
}

// A lock's file of this version, of the one before, and of one that was cut off are all read.
func TestLockNamesItsAgent(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	socket := filepath.Join(dir, "agent.sock")
	listener, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	digest := deployments.Digest{1}.String()
	for _, c := range []struct {
		text, last, unit string
	}{
		{"", "", ""},
		{digest + "\n", digest, ""},
		{digest + "\n\n", digest, ""},
		{digest + "\nagent prod/web/app " + socket + "\n", digest, "prod/web/app"},
		{digest + "\nagent prod/web/app " + socket + ".none\n", digest, ""},
		{digest + "\nagent prod/web/app", digest, ""},
		{"\nagent prod/web/app " + socket + "\nmore of a later version\n", "", "prod/web/app"},
	} {
		var l destLock
		l.read(c.text)
		if unit, lives := l.livingAgent(t.Context()); l.last != c.last || unit != c.unit || lives != (c.unit != "") {
			t.Errorf("%q: last %q, unit %q, %v", c.text, l.last, unit, lives)
		}
	}
}

// Whoever owns dest's directory can't have the lock wait for ever, or another's file emptied.
func TestLockIsAFileOfItsOwn(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	other := filepath.Join(dir, "other")
	for name, plant := range map[string]func(lock string) error{
		"link":  func(lock string) error { return os.Symlink(other, lock) },
		"alias": func(lock string) error { return os.Link(other, lock) },
		"pipe":  func(lock string) error { return unix.Mkfifo(lock, 0o666) },
	} {
		if err := os.WriteFile(other, []byte("precious"), 0o600); err != nil {
			t.Fatal(err)
		}
		dest := filepath.Join(dir, name)
		if err := plant(filepath.Join(dir, lockName(dest))); err != nil {
			t.Fatal(err)
		}
		u, err := Open(Config{Node: func() string { return "" }, Dir: filepath.Join(dir, "state")})
		if err != nil {
			t.Fatal(err)
		}
		r := &artifact.Release{Manifest: &deployments.Manifest{Src: "file:///x", Dest: dest, Strategy: deployments.StrategyRsync}}
		if unlock, err := u.lockDest(t.Context(), r); err == nil {
			u.lock.noteBegun()
			unlock()
			t.Errorf("%s: it is taken for a lock", name)
		}
		if got, err := os.ReadFile(other); err != nil || string(got) != "precious" {
			t.Errorf("%s: another's file holds %q, %v", name, got, err)
		}
	}
}
