package artifact

import (
	"context"
	"log/slog"

	"kedge/artifact/object"
	"kedge/deployments"
)

// Releases is where one dest's releases lie: DEST.releases/, beside dest, so that both are on one file system.
//
//	/srv/app                                  symlink to app.releases/1.4.2-9f2c01ab34cd, relative
//	/srv/app.releases/1.4.2-9f2c01ab34cd/     a complete, verified, synced tree
//	/srv/app.releases/.kedge/…                manifests, indexes, trees being staged; private (0700)
//
// One process at a time may use it (the agent's lock on its state directory sees to that).
type Releases struct {
	dest    string
	objects *object.Client
	log     *slog.Logger
}

// Release is a complete tree on disk.
type Release struct {
	Pointer  deployments.Pointer
	Manifest *deployments.Manifest
	Raw      []byte // the manifest's bytes
	Dir      string // absolute
}

// Progress is told while a release is staged or published. Bytes; Total is 0 while unknown.
type Progress struct {
	Phase       string // "fetch", "verify", "pack", "upload"
	Done, Total int64
}

// StageOptions for Releases.Stage.
type StageOptions struct {
	Progress func(Progress) // nil: nobody; called at most a few times a second
	// Base is the release to take unchanged files from; zero: the current one.
	Base deployments.Pointer
}

// Open opens the releases of dest. It makes nothing on disk.
func Open(dest string, objects *object.Client, log *slog.Logger) *Releases {
	return &Releases{dest: dest, objects: objects, log: log}
}

// FetchManifest reads the manifest that p points to, checks its digest, and parses it. A wrong digest is ErrDigest.
func FetchManifest(ctx context.Context, objects *object.Client, p deployments.Pointer, env func(string) (string, bool)) (*deployments.Manifest, []byte, error) {
	return fetchManifest(ctx, objects, p, env)
}

// Stage makes the release of p lie complete, verified and synced in its own directory, and returns it. It does nothing where it
// does so already. Killed at any point, the next Stage finishes or starts again, and never takes a half tree for a whole one.
// raw is the manifest's bytes, whose digest is p's. A full disk is reported before anything is fetched, where sizes are known.
func (r *Releases) Stage(ctx context.Context, p deployments.Pointer, m *deployments.Manifest, raw []byte, opt StageOptions) (*Release, error) {
	return r.stage(ctx, p, m, raw, opt)
}

// Find returns a release that lies complete on disk, or ErrNoRelease.
func (r *Releases) Find(digest deployments.Digest) (*Release, error) { return r.find(digest) }

// Current returns what dest resolves to, or ErrNoRelease where dest is absent, or not a link of ours.
func (r *Releases) Current() (*Release, error) { return r.current() }

// Switch makes dest resolve to rel by one rename, and syncs the directory. Where dest is a directory of before kedge's time, the
// two are exchanged in one system call (renameat2 RENAME_EXCHANGE) and the old tree is kept in DEST.releases/.
func (r *Releases) Switch(rel *Release) error { return r.switchTo(rel) }

// Prune removes old releases but the keep newest, the current one and those in protect; also what was left half staged.
func (r *Releases) Prune(keep int, protect ...deployments.Digest) error {
	return r.prune(keep, protect...)
}

// Difference is one path of a live tree that isn't as its release says.
type Difference struct {
	Path string // relative to the tree
	What string // "missing", "extra", "content", "mode", "owner", "link", "type"
}

// Verify compares a release's tree with its index (or, without one, with the list of hashes that was taken when it was
// staged), and names what differs. It reads every byte; limit, in bytes a second, keeps it out of the way (0: none).
func (r *Releases) Verify(ctx context.Context, rel *Release, limit int64) ([]Difference, error) {
	return r.verify(ctx, rel, limit)
}

// Unpack puts a manifest's tree into the empty directory dir, verified and synced: for the rsync and mv strategies.
func Unpack(ctx context.Context, objects *object.Client, m *deployments.Manifest, dir string, opt StageOptions) error {
	return unpack(ctx, objects, m, dir, opt)
}
