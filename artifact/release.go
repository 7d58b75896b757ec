package artifact

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"kedge/artifact/meter"
	"kedge/artifact/object"
	"kedge/artifact/safefs"
	"kedge/deployments"
)

// ErrNoRelease means that a release is not complete on this disk, or that dest leads to none.
var ErrNoRelease = errors.New("no such release on this disk")

// Releases manages one dest's releases in DEST.releases/, beside dest, so that both are on one file system.
//
//	/srv/app                               symlink to app.releases/1.4.2-9f2c01ab34cd, relative
//	/srv/app.releases/1.4.2-9f2c01ab34cd/  a complete, verified, synced tree
//	/srv/app.releases/adopted-…/           what was at dest before kedge; never deleted
//	/srv/app.releases/.kedge/…             manifests, indexes, what commands made, trees being staged; private (0700)
//	/srv/app.shared/…                      the manifest's shared paths, which releases link to; never removed
//
// A release is complete if its directory and its record in .kedge exist. A new directory gets its name by one rename,
// after its tree, index and record are on the disk. One process at a time may change DEST.releases: package deploy
// ensures it by a lock file beside dest.
type Releases struct {
	dest    string
	objects *object.Client
	log     *slog.Logger
	// within and owner are those of safefs.PlaceOptions: where dest must lie, and who may own the directories to it.
	within []string
	owner  string
	// checkOwner is SwitcherConfig.CheckOwner.
	checkOwner func(uid, gid int) error
	// hashAlways is SwitcherConfig.HashAlways.
	hashAlways bool
	// step is called before and after changes on disk. Tests kill the process in it. May be nil.
	step func(name string)
	// places are the directories that enter has opened; nil: enter has opened none.
	places *heldPlaces
}

// heldPlaces are the directories of a dest's releases, open during one call.
type heldPlaces struct{ parent, top, private *safefs.Place }

func (h *heldPlaces) close() {
	for _, p := range []*safefs.Place{h.parent, h.top, h.private} {
		if p != nil {
			p.Close()
		}
	}
}

// Release is a release: its pointer, its manifest and, if it was found on this node, its directory.
type Release struct {
	Pointer deployments.Pointer `json:"pointer"`
	// Manifest was parsed from Raw, with the environment variables of that moment. It is stored,
	// and not parsed again when the release is read from disk.
	Manifest *deployments.Manifest `json:"manifest"`
	Raw      []byte                `json:"raw"` // the manifest's bytes
	// Dir is the absolute path of the release's directory in DEST.releases; only Find, Current,
	// Stage, withDirIn set it.
	Dir string `json:"-"`
}

// StageOptions are the options of Stage and Unpack.
type StageOptions struct {
	Progress func(meter.Progress) // called at most a few times a second; may be nil
	// Base is the release to take unchanged files from; zero: the current one. Only Releases.Stage uses it.
	Base deployments.Pointer
	// Log gets each reason why more is fetched than should be needed, once per fetch. If it is nil, Releases.Stage takes
	// the log of the Releases, and others log nothing.
	Log *slog.Logger
	// resumes lets a fetch that was cut off leave a spool beside the directory that it fills. Whoever owns that directory
	// must remove the spool.
	resumes bool
}

// Difference is one path at which a tree differs from a release.
type Difference struct {
	Path string `json:"path"` // relative to the tree, which itself is "."
	What string `json:"what"` // "missing", "extra", "content", "mode", "owner", "link", "type", "index"
}

// Open returns the releases of dest. It changes nothing on disk. log may be nil.
func Open(dest string, objects *object.Client, log *slog.Logger) *Releases {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	return &Releases{dest: filepath.Clean(dest), objects: objects, log: log}
}

// WithBounds returns a copy of the Releases with bounds. within says where dest may lie, and owner
// who may own the directories that lead there: see safefs.PlaceOptions. checkOwner checks who files
// may belong to: see SwitcherConfig.
func (r *Releases) WithBounds(within []string, owner string, checkOwner func(uid, gid int) error) *Releases {
	bounded := *r
	bounded.within, bounded.owner, bounded.checkOwner = within, owner, checkOwner
	return &bounded
}

// enter opens dest's parent, DEST.releases and its private directory for one call. in is a copy of r whose paths lead
// through these directories, so that renaming a parent redirects nothing. leave closes them. If r has them open
// already, in is r, and leave does nothing. With create, enter makes missing ones. Without create, a directory that is
// missing or a file is an error that wraps ErrNoRelease.
func (r *Releases) enter(create bool) (in *Releases, leave func(), err error) {
	if r.places != nil {
		return r, func() {}, nil
	}
	h := &heldPlaces{}
	defer func() {
		if err != nil {
			h.close()
		}
		if err != nil && !create && (errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENOTDIR)) {
			err = fmt.Errorf("%s: %w", r.dest, ErrNoRelease)
		}
	}()
	if h.parent, err = safefs.OpenPlace(r.dest,
		safefs.PlaceOptions{Within: r.within, Owner: r.owner, Create: create}); err != nil {
		return nil, nil, err
	}
	if h.top, err = h.parent.OpenPrivate(filepath.Base(r.shownTop()), create); err != nil {
		return nil, nil, err
	}
	if h.private, err = h.top.OpenPrivate(privateName, create); err != nil {
		return nil, nil, err
	}
	held := *r
	held.places = h
	return &held, h.close, nil
}

// shownTop returns the path DEST.releases, for people and commands.
func (r *Releases) shownTop() string { return r.dest + ".releases" }

// top returns a path to DEST.releases: through the open directory if enter has opened it, else the
// path that shownTop returns.
func (r *Releases) top() string {
	if r.places == nil {
		return r.shownTop()
	}
	return r.places.top.Path("")
}

// private returns a path to the directory, closed to other users, that holds kedge's own files.
func (r *Releases) private() string {
	if r.places == nil {
		return filepath.Join(r.shownTop(), privateName)
	}
	return r.places.private.Path("")
}

// link returns a path to dest.
func (r *Releases) link() string { return filepath.Join(r.parent(), filepath.Base(r.dest)) }

// parent returns a path to the directory that dest lies in.
func (r *Releases) parent() string {
	if r.places == nil {
		return filepath.Dir(r.dest)
	}
	return r.places.parent.Path("")
}

// dirOf returns a path to a release's directory, below top.
func (r *Releases) dirOf(rel *Release) string { return filepath.Join(r.top(), filepath.Base(rel.Dir)) }

// record is the content of .kedge/NAME.json for the release whose directory is NAME. It is written after the index.
type record struct {
	Release
	Index deployments.Digest `json:"index"` // of .kedge/NAME.index
}

const (
	recordSuffix  = ".json"
	indexSuffix   = ".index"
	stagingPrefix = "staging-"
	trashPrefix   = "trash-"
	healPrefix    = "heal-"    // what Releases.replace exchanged for a staged tree
	adoptedPrefix = "adopted-" // followed by a time
	adoptedTime   = "20060102T150405.000000"
	// unfinishedPrefix begins the names of files that a crash in durable.WriteFile or
	// writeFileStats leaves. The name of a release never begins with it.
	unfinishedPrefix = "."
	linkName         = "link"
	privateName      = ".kedge"
)

// withDirIn returns a copy of rel whose Dir is the release's path in DEST.releases, whether or not
// that directory exists.
func (rel *Release) withDirIn(r *Releases) *Release {
	at := *rel
	at.Dir = filepath.Join(r.shownTop(), nameOf(rel.Manifest.Version, rel.Pointer.Digest))
	return &at
}

// nameOf returns the name of a release's directory.
func nameOf(version string, digest deployments.Digest) string {
	if version == "" {
		return digest.Short()
	}
	return version + "-" + digest.Short()
}

func (r *Releases) readRecord(name string) (*record, error) {
	var rec record
	err := readRecord(filepath.Join(r.private(), name+recordSuffix), &rec, &rec.Release)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, errDamaged) {
		err = fmt.Errorf("%w: %w", ErrNoRelease, err)
	}
	return &rec, err
}

// errDamaged means that a release's record doesn't parse, or holds no manifest.
var errDamaged = errors.New("it is damaged")

// readRecord decodes the JSON file at path into to. rel is to itself, or the Release in it. If the
// file doesn't parse, or holds no manifest, the error wraps errDamaged.
func readRecord(path string, to any, rel *Release) error {
	data, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	if err := json.Unmarshal(data, to); err != nil {
		return fmt.Errorf("reading %s: %w: %w", path, errDamaged, err)
	}
	if rel.Manifest == nil {
		return fmt.Errorf("reading %s: %w: it holds no manifest", path, errDamaged)
	}
	return nil
}

// load returns the release whose directory is called name, and its record. If the directory is missing, or the record
// is missing or damaged, the error wraps ErrNoRelease.
func (r *Releases) load(name string) (*Release, *record, error) {
	rec, err := r.readRecord(name)
	if err != nil {
		return nil, nil, err
	}
	dir := filepath.Join(r.shownTop(), name)
	if info, err := os.Lstat(filepath.Join(r.top(), name)); err != nil || !info.IsDir() {
		return nil, nil, fmt.Errorf("%s: %w", dir, ErrNoRelease)
	}
	rec.Dir = dir
	return &rec.Release, rec, nil
}

// names returns the directory names of all releases that have a record. Those that were staged,
// healed or switched to most recently come first.
func (r *Releases) names() ([]string, error) {
	entries, err := os.ReadDir(r.private())
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	type aged struct {
		name string
		time time.Time
	}
	var found []aged
	for _, e := range entries {
		name, ok := strings.CutSuffix(e.Name(), recordSuffix)
		if !ok {
			continue
		}
		if info, err := e.Info(); err == nil {
			found = append(found, aged{name, info.ModTime()})
		}
	}
	slices.SortStableFunc(found, func(a, b aged) int { return b.time.Compare(a.time) })
	names := make([]string, len(found))
	for i, a := range found {
		names[i] = a.name
	}
	return names, nil
}

// Find returns the release of a manifest's digest. If it isn't complete on this disk, the error wraps ErrNoRelease.
func (r *Releases) Find(digest deployments.Digest) (*Release, error) {
	rel, _, err := r.find(digest)
	return rel, err
}

func (r *Releases) find(digest deployments.Digest) (*Release, *record, error) {
	r, leave, err := r.enter(false)
	if err != nil {
		return nil, nil, err
	}
	defer leave()
	names, err := r.names()
	if err != nil {
		return nil, nil, err
	}
	for _, name := range names {
		if name != digest.Short() && !strings.HasSuffix(name, "-"+digest.Short()) {
			continue
		}
		if rel, rec, err := r.load(name); err == nil && rec.Pointer.Digest == digest {
			return rel, rec, nil
		}
	}
	return nil, nil, fmt.Errorf("%s: %w", digest.Short(), ErrNoRelease)
}

// Current returns the release that dest leads to. If there is none, or it isn't complete, the error wraps ErrNoRelease.
func (r *Releases) Current() (*Release, error) {
	rel, _, err := r.current()
	return rel, err
}

func (r *Releases) current() (*Release, *record, error) {
	r, leave, err := r.enter(false)
	if err != nil {
		return nil, nil, err
	}
	defer leave()
	target, err := linkTarget(r.link(), r.dest)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.EINVAL) || errors.Is(err, syscall.ENOTDIR) {
		return nil, nil, fmt.Errorf("%s: %w", r.dest, ErrNoRelease)
	}
	if err != nil {
		return nil, nil, err
	}
	if filepath.Dir(target) != r.shownTop() {
		return nil, nil, fmt.Errorf("%s leads to %s: %w", r.dest, target, ErrNoRelease)
	}
	return r.load(filepath.Base(target))
}

func (r *Releases) readIndex(name string, rec *record) ([]byte, error) {
	data, err := os.ReadFile(filepath.Join(r.private(), name+indexSuffix))
	if err != nil {
		return nil, err
	}
	if deployments.DigestOf(data) != rec.Index {
		return nil, fmt.Errorf("%w: its index on this disk is damaged", deployments.ErrDigest)
	}
	return data, nil
}

// reachStep calls step, if that is set.
func (r *Releases) reachStep(name string) {
	if r.step != nil {
		r.step(name)
	}
}

// globLiteral escapes a path to a pattern that matches it alone.
var globLiteral = strings.NewReplacer("*", "\\*", "?", "\\?", "[", "\\[", "\\", "\\\\")
