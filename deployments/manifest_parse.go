package deployments

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/goccy/go-yaml/ast"
)

const (
	maxDeltas   = 32
	maxObject   = 1 << 50 // bytes of an archive, an index or a delta
	defaultKeep = 3
	maxKeep     = 1000
	maxEnv      = 1000
	maxSecrets  = 100

	// DefaultCommandTimeout is the timeout of a command in kedge's own manifests if none is given.
	// stretchersTimeout is the same for stretcher's manifests.
	DefaultCommandTimeout = 10 * time.Minute
	stretchersTimeout     = 24 * time.Hour
	defaultHealthTimeout  = 60 * time.Second
	defaultHealthEvery    = 10 * time.Second
	defaultHealthFailures = 3
	maxHealthFailures     = 1000
	defaultCheckInterval  = time.Second
	defaultCheckTimeout   = 5 * time.Second
)

// ParseManifest parses the manifest found at url, whose digest the caller has checked. As in
// stretcher, {{ env "NAME" "default" }} and {{ must_env "NAME" }} are first replaced by what env
// returns. A nil env has no variables. Relative URLs are made absolute against url. Unknown fields
// (which stretcher ignores), fields given twice and bad values are Problems with line and column. A
// field without a value counts as left out, as in stretcher, and so does one that begins with x-.
func ParseManifest(data []byte, url string, env func(string) (string, bool)) (*Manifest, error) {
	if env == nil {
		env = func(string) (string, bool) { return "", false }
	}
	m, _, err := readManifest(data, url, env)
	return m, err
}

// ParseTemplate parses a manifest whose variables aren't known. Fields that contain a variable are
// not checked: in the result they are empty, or have a placeholder for the variable. A condition
// that depends on a variable may turn out either way.
func ParseTemplate(data []byte, url string) (*Manifest, error) {
	m, _, err := readManifest(data, url, nil)
	return m, err
}

// variable is the placeholder for an unknown variable's value.
const variable = "kedge-variable"

// ManifestTraps returns a warning for each part of a manifest that may surprise people, mostly in old ones of
// stretcher's. Variables are treated as unknown. The error is that of ParseTemplate.
func ManifestTraps(data []byte) ([]Problem, error) {
	_, traps, err := readManifest(data, "file:///manifest.yaml", nil)
	return traps, err
}

// readManifest parses a manifest, and also returns its traps (see ManifestTraps). If env is nil, variables are unknown,
// and a condition that depends on one may turn out either way. The result is then that of the first combination of
// outcomes for which the manifest is valid. If none is valid, the error is that of the first combination.
func readManifest(data []byte, url string, env func(string) (string, bool)) (*Manifest, []Problem, error) {
	if len(data) > MaxManifest {
		return nil, nil, fmt.Errorf("the manifest has %d bytes, at most %d are allowed", len(data), MaxManifest)
	}
	data = bytes.TrimPrefix(data, []byte("\ufeff")) // Editors leave a byte-order mark there.
	t, err := parseTemplate(string(data))
	if err != nil {
		return nil, nil, fmt.Errorf("the manifest: %w", err)
	}
	if env != nil {
		e, err := t.expand(env, nil)
		if err != nil {
			return nil, nil, fmt.Errorf("the manifest: %w", err)
		}
		return readExpanded(e, url, false)
	}
	env = func(string) (string, bool) { return variable, true }
	e, err := t.expand(env, func(int, bool) bool { return true })
	if err != nil {
		return nil, nil, fmt.Errorf("the manifest: %w", err)
	}
	m, traps, err := readExpanded(e, url, true)
	if err == nil || e.conditions == 0 {
		return m, traps, err
	}
	tried := 0
	for i, outcome := range outcomes(e.conditions) {
		if i >= sureOutcomes && tried > maxTried {
			break
		}
		e, failed := t.expand(env, outcome)
		if failed != nil {
			continue
		}
		tried += len(e.text)
		if m, traps, failed := readExpanded(e, url, true); failed == nil {
			return m, traps, nil
		}
	}
	return nil, nil, err
}

const (
	// maxOutcomes bounds how many conditions of a template are tried one by one.
	maxOutcomes = 16
	// sureOutcomes is how many outcomes of a manifest are tried in any case. Further outcomes are
	// tried until the texts tried so far have more than maxTried bytes together, as the YAML parser
	// takes up to 0.5 s for one text.
	sureOutcomes = 2
	maxTried     = 64 << 10
)

// outcomes returns ways in which a template's n conditions on unknown variables may turn out, apart
// from all being true. In the first, all are false. In the second, each is as the placeholder makes
// it, so that conditions on the same variable agree, such as eq and ne. Next, for each of the first
// maxOutcomes conditions, only that condition is true. Last, for each of them, only that condition
// differs from what the placeholder makes it.
func outcomes(n int) []chooser {
	all := []chooser{
		func(int, bool) bool { return false },
		func(_ int, yes bool) bool { return yes },
	}
	for i := range min(n, maxOutcomes) {
		all = append(all, func(condition int, _ bool) bool { return condition == i })
	}
	for i := range min(n, maxOutcomes) {
		all = append(all, func(condition int, yes bool) bool { return yes != (condition == i) })
	}
	return all
}

func readExpanded(e expansion, url string, unknownVariables bool) (*Manifest, []Problem, error) {
	r := &manifestReader{
		reader: reader{file: "manifest", unknownVariables: unknownVariables, lax: true},
		traps:  reader{file: "manifest"},
		url:    url,
		m: &Manifest{
			DestMode: 0o755, Strategy: StrategyRsync, Keep: defaultKeep,
			Symlinks: SymlinksInside,
			Health:   Health{Timeout: defaultHealthTimeout, Every: defaultHealthEvery, Failures: defaultHealthFailures},
		},
	}
	root := r.parse([]byte(e.text), MaxManifest)
	if root == nil && r.err() == nil {
		return nil, nil, errors.New("the manifest is empty")
	}
	if root != nil {
		r.read(root)
	}
	if err := r.err(); err != nil {
		e.hide(r.problems)
		return nil, nil, err
	}
	if !unknownVariables {
		r.m.Sensitive = maskedValues(e.values, r.m)
	}
	return r.m, r.traps.problems, nil
}

type manifestReader struct {
	reader
	traps reader
	url   string
	m     *Manifest
	// timeout is the manifest's commands.timeout, for commands without one of their own; 0: not given.
	timeout time.Duration
}

// stretchersFields are the fields that stretcher reads. A manifest with no others, and with a
// strategy other than release, counts as stretcher's.
var stretchersFields = []string{
	"src", "checksum", "dest", "dest_mode", "commands", "excludes", "exclude_from", "sync_strategy",
}

// setTimeouts gives a timeout to each command that has none: commands.timeout if that is given. If
// it isn't, commands of kedge's own manifests (own is set) get DefaultCommandTimeout, and
// setTimeouts notes a trap. stretcher has no timeouts. Commands of its manifests get
// stretchersTimeout, as a command that runs longer than that will hardly end.
func (r *manifestReader) setTimeouts(own bool, place ast.Node) {
	timeout, lists := cmp.Or(r.timeout, stretchersTimeout), r.m.Commands.lists()
	open := false
	if own {
		timeout = cmp.Or(r.timeout, DefaultCommandTimeout)
	}
	for _, list := range lists {
		for i := range list {
			if list[i].Timeout == 0 {
				list[i].Timeout, open = timeout, true
			}
		}
	}
	if open && own && r.timeout == 0 {
		r.traps.noteAt(place,
			"commands without a timeout of their own are ended after %s: commands.timeout sets it for all",
			DefaultCommandTimeout)
	}
}

func (r *manifestReader) read(root ast.Node) {
	m := r.m
	seen := r.fields(root, "the manifest", map[string]func(ast.Node){
		"name":          into(&r.reader, &m.Name, asShown),
		"version":       into(&r.reader, &m.Version, asShown),
		"created":       into(&r.reader, &m.Created, asCreated),
		"src":           into(&r.reader, &m.Src, r.asURL),
		"checksum":      into(&r.reader, &m.Checksum, asChecksum),
		"size":          into(&r.reader, &m.Size, asNumber(1, maxObject)),
		"index":         func(n ast.Node) { m.Index = &Blob{}; r.blob(n, "index", m.Index, nil) },
		"deltas":        r.deltas,
		"dest":          into(&r.reader, &m.Dest, asDest),
		"dest_mode":     r.destMode,
		"sync_strategy": into(&r.reader, &m.Strategy, asOneOf(StrategyRsync, StrategyMv, StrategyRelease)),
		"excludes":      intoList(&r.reader, &m.Excludes, asText),
		"exclude_from":  into(&r.reader, &m.ExcludeFrom, asText),
		"owner":         into(&r.reader, &m.Owner, asOwner),
		"keep":          into(&r.reader, &m.Keep, asInt(1, maxKeep)),
		"shared":        intoList(&r.reader, &m.Shared, asShared),
		"symlinks":      into(&r.reader, &m.Symlinks, asOneOf(SymlinksInside, SymlinksAny)),
		"immutable":     into(&r.reader, &m.Immutable, asBool),
		"commands":      r.commands,
		"secrets":       r.secrets,
		"health":        r.health,
		"drain":         into(&r.reader, &m.Drain, asDuration),
	})
	own := m.Strategy == StrategyRelease
	for name := range seen {
		own = own || !slices.Contains(stretchersFields, name)
	}
	for _, s := range []*string{&m.Name, &m.Version} {
		if r.unknownVariables && strings.Contains(*s, variable) {
			*s = "" // The value must be neither shown nor used.
		}
	}
	place := func(field string) ast.Node {
		if n := seen[field]; n != nil {
			return n
		}
		return root
	}
	switch {
	case m.Src != "" && m.Dest == "" && seen["dest"] == nil:
		r.noteAt(place("src"), "dest is missing: where should src go live?")
	case m.Src == "" && m.Index != nil:
		r.noteAt(place("index"), "index needs src: add the archive's URL, or remove index")
	case m.Src != "" && m.Checksum == "" && m.Index == nil && seen["checksum"] == nil:
		r.noteAt(place("src"), "checksum is missing: the archive could change under the nodes")
	case len(m.Shared) > 0 && m.Strategy != StrategyRelease:
		r.noteAt(place("shared"),
			"shared needs sync_strategy release: with rsync, name the paths in excludes instead")
	case nested(m.Shared):
		r.noteAt(place("shared"), "one shared path lies within another, or is given twice: name the outer one once")
	case m.Strategy == StrategyRelease && (len(m.Excludes) > 0 || m.ExcludeFrom != ""):
		r.noteAt(place("excludes"),
			"excludes work with sync_strategy rsync only: with release, leave the files out of the archive")
	}
	for name := range m.Secrets {
		if _, twice := m.Commands.Env[name]; twice {
			r.noteAt(place("secrets"), "variable %q stands in secrets and in commands.env", name)
		}
	}
	r.setTimeouts(own, place("commands"))
	r.findTraps(place)
}

func (r *manifestReader) findTraps(place func(string) ast.Node) {
	m := r.m
	switch {
	case m.Src == "":
	case m.Strategy == StrategyRsync:
		r.traps.noteAt(place("sync_strategy"),
			"sync_strategy rsync changes dest file by file: a kill leaves it half deployed. "+
				"sync_strategy: release has no such gap")
	case m.Strategy == StrategyMv:
		r.traps.noteAt(place("sync_strategy"),
			"with sync_strategy mv dest is missing until the tree is moved there: a kill in between takes the release down. "+
				"sync_strategy: release has no such gap")
	}
	for _, theirs := range []string{"/home/", "/tmp/", "/var/tmp/", "/dev/shm/"} {
		if m.Src != "" && strings.HasPrefix(m.Dest, theirs) {
			r.traps.noteAt(
				place("dest"),
				"dest %s lies below a directory that users other than root can change: such users can take the release down, "+
					"or have their own files run with more rights than they have; choose one below a directory that only root can "+
					"change, such as /srv",
				clip(m.Dest),
			)
		}
	}
	switch len(m.Checksum) {
	case 32, 40:
		r.traps.noteAt(place("checksum"), "md5 and sha1 can be forged: use sha256")
	}
	for _, list := range []struct {
		name     string
		commands []Command
	}{{"post", m.Commands.Post}, {"failure", m.Commands.Failure}, {"success", m.Commands.Success}} {
		for _, c := range list.commands {
			if strings.HasPrefix(c.Run, "./") || strings.Contains(c.Run, " ./") {
				r.traps.noteAt(
					place("commands"),
					"%s command %q names a path relative to the working directory: stretcher ran it in one that was deleted after a failure, kedge runs it in /; use $KEDGE_RELEASE or an absolute path",
					list.name,
					clip(c.Run),
				)
			}
		}
	}
}

// destMode reads an octal mode: 755, 0755 or 0o755. stretcher read 755 as a decimal number, which is mode 01363.
func (r *manifestReader) destMode(n ast.Node) {
	s, ok := r.text(n)
	if !ok {
		return
	}
	digits := strings.TrimPrefix(strings.TrimPrefix(s, "0o"), "0")
	mode, err := strconv.ParseUint(digits, 8, 32)
	if err != nil || mode&0o777 == 0 || mode > 0o7777 {
		if r.unknownVariables && strings.Contains(s, variable) {
			return
		}
		r.noteAt(n, "%q: want a mode in octal, as in 0755", clip(s))
		return
	}
	if digits == s && n.Type() == ast.IntegerType {
		r.traps.noteAt(n, "dest_mode: %s is read in octal here; stretcher read it as a decimal number: write 0%s", s, s)
	}
	if mode > 0o777 {
		r.traps.noteAt(n, "dest_mode: of %s only the last three digits count, here as with stretcher", s)
	}
	r.m.DestMode = fs.FileMode(mode & 0o777)
}

func (r *manifestReader) blob(n ast.Node, what string, b *Blob, more map[string]func(ast.Node)) {
	known := map[string]func(ast.Node){
		"url":    into(&r.reader, &b.URL, r.asURL),
		"size":   into(&r.reader, &b.Size, asNumber(1, maxObject)),
		"sha256": into(&r.reader, &b.SHA256, ParseDigest),
	}
	for name, f := range more {
		known[name] = f
	}
	seen := r.fields(n, what, known)
	for name := range known {
		if seen[name] == nil {
			r.noteAt(n, "%s lacks the field %s", what, name)
		}
	}
}

func (r *manifestReader) deltas(n ast.Node) {
	r.each(n, func(item ast.Node) {
		var d Delta
		r.blob(item, "a delta", &d.Blob, map[string]func(ast.Node){"from": into(&r.reader, &d.From, ParseDigest)})
		r.m.Deltas = append(r.m.Deltas, d)
	})
	if len(r.m.Deltas) > maxDeltas {
		r.noteAt(n, "%d deltas, at most %d are allowed", len(r.m.Deltas), maxDeltas)
	}
}

func (r *manifestReader) commands(n ast.Node) {
	c := &r.m.Commands
	r.fields(n, "commands", map[string]func(ast.Node){
		"env":     r.environment,
		"timeout": into(&r.reader, &r.timeout, asPositive),
		"pre":     r.commandList(&c.Pre),
		"post":    r.commandList(&c.Post),
		"success": r.commandList(&c.Success),
		"failure": r.commandList(&c.Failure),
	})
}

func (r *manifestReader) environment(n ast.Node) {
	env := map[string]string{}
	r.variables(n, "env", "RAILS_ENV: production", maxEnv, func(name string, given ast.Node) {
		env[name] = ""
		if empty(given) {
			return
		}
		if value, ok := r.text(given); ok {
			env[name] = value
		}
		if strings.ContainsRune(env[name], 0) {
			r.noteAt(given, "variable %q contains a NUL", name)
		}
	})
	if len(env) > 0 {
		r.m.Commands.Env = env
	}
}

func (r *manifestReader) secrets(n ast.Node) {
	refs := map[string]SecretRef{}
	r.variables(n, "secrets", "DB_URL: ssm:/prod/db", maxSecrets, func(name string, given ast.Node) {
		var ref SecretRef
		if empty(given) {
			r.noteAt(n, "secret %q has no reference, as in ssm:/prod/db", name)
		} else {
			into(&r.reader, &ref, ParseSecretRef)(given)
		}
		refs[name] = ref
	})
	if len(refs) > 0 {
		r.m.Secrets = refs
	}
}

// variables reads a mapping whose keys are names of environment variables. Names that begin with KEDGE_, as those that
// kedge sets do, are refused.
func (r *manifestReader) variables(n ast.Node, what, example string, most int, read func(name string, given ast.Node)) {
	values, ok := r.entries(n)
	if !ok {
		r.noteAt(n, "%s: want variables by name, as in %s", what, example)
	}
	names := map[string]bool{}
	for _, v := range values {
		name := keyOf(v)
		switch {
		case names[name]:
			r.noteAt(v.Key, "variable %q is given twice in %s", name, what)
		case !variableName.MatchString(name) || len(name) > 128:
			r.noteAt(v.Key, "variable %q: want letters, digits and '_', beginning with a letter or '_'", clip(name))
		case strings.HasPrefix(name, "KEDGE_"):
			r.noteAt(v.Key, "variable %q: names that begin with KEDGE_ are reserved: choose another", clip(name))
		default:
			names[name] = true
			read(name, r.resolve(v.Value))
		}
	}
	if len(names) > most {
		r.noteAt(n, "%s has %d variables, at most %d are allowed", what, len(names), most)
	}
}

func (r *manifestReader) commandList(to *[]Command) func(ast.Node) {
	return func(n ast.Node) {
		r.each(n, func(item ast.Node) {
			var c Command
			switch item.(type) {
			case *ast.MappingNode, *ast.MappingValueNode:
				seen := r.fields(item, "a command", map[string]func(ast.Node){
					"run":     into(&r.reader, &c.Run, asText),
					"timeout": into(&r.reader, &c.Timeout, asPositive),
					"user":    into(&r.reader, &c.User, asUser),
					"once":    into(&r.reader, &c.Once, asBool),
				})
				if seen["run"] == nil || c.Run == "" {
					r.noteAt(item, "a command lacks the field run")
				}
			default:
				if into(&r.reader, &c.Run, asText)(item); c.Run == "" {
					return // stretcher passes an empty command to the shell, which does nothing
				}
			}
			*to = append(*to, c)
		})
	}
}

func (r *manifestReader) health(n ast.Node) {
	h := &r.m.Health
	r.fields(n, "health", map[string]func(ast.Node){
		"timeout":    into(&r.reader, &h.Timeout, asPositive),
		"stable_for": into(&r.reader, &h.StableFor, asDuration),
		"every":      into(&r.reader, &h.Every, asPositive),
		"failures":   into(&r.reader, &h.Failures, asInt(1, maxHealthFailures)),
		"checks": func(n ast.Node) {
			r.each(n, func(item ast.Node) { h.Checks = append(h.Checks, r.check(item)) })
		},
	})
}

func (r *manifestReader) check(n ast.Node) Check {
	c := Check{Interval: defaultCheckInterval, Timeout: defaultCheckTimeout}
	kinds := map[string]func(ast.Node){
		"http": func(n ast.Node) {
			c.HTTP = &HTTPCheck{}
			switch n.(type) {
			case *ast.MappingNode, *ast.MappingValueNode:
				seen := r.fields(n, "http", map[string]func(ast.Node){
					"url":      into(&r.reader, &c.HTTP.URL, asHTTP),
					"status":   into(&r.reader, &c.HTTP.Status, asInt(100, 599)),
					"contains": into(&r.reader, &c.HTTP.Contains, asText),
				})
				if seen["url"] == nil {
					r.noteAt(n, "http lacks the field url")
				}
			default:
				into(&r.reader, &c.HTTP.URL, asHTTP)(n)
			}
		},
		"tcp":     into(&r.reader, &c.TCP, asFilled),
		"exec":    into(&r.reader, &c.Exec, asFilled),
		"systemd": into(&r.reader, &c.Systemd, asFilled),
		"consul":  into(&r.reader, &c.Consul, asFilled),
	}
	known := map[string]func(ast.Node){
		"interval": into(&r.reader, &c.Interval, asPositive),
		"timeout":  into(&r.reader, &c.Timeout, asPositive),
		"during":   into(&r.reader, &c.During, asOneOf(DuringDeploy)),
		"user":     into(&r.reader, &c.User, asUser),
	}
	for name, f := range kinds {
		known[name] = f
	}
	seen := r.fields(n, "a check", known)
	found := 0
	for name := range kinds {
		if seen[name] != nil {
			found++
		}
	}
	if found != 1 {
		r.noteAt(n, "a check is exactly one of http, tcp, exec, systemd, consul; this has %d of them", found)
	}
	if user := seen["user"]; user != nil && seen["exec"] == nil {
		r.noteAt(user, "user is for exec alone, and this check has no exec")
	}
	return c
}
