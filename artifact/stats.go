package artifact

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"kedge/artifact/archive"
	"kedge/artifact/safefs"
	"kedge/deployments"
)

// fileStat identifies a state of a file in which its content was written or hashed. Whoever writes to the file
// changes its ctime, which only root can set. Zero: unknown.
//
// The device number is left out: it may change with a reboot, and differs between machines booted from one image.
type fileStat struct {
	inode        uint64
	mtime, ctime int64 // nanoseconds
}

func statOf(st *unix.Stat_t) fileStat {
	return fileStat{st.Ino, st.Mtim.Nano(), st.Ctim.Nano()}
}

// sameContent reports whether s and later, two stats of one file, have the same inode and mtime. The ctime is ignored,
// as adding or removing a hard link changes it, too. A writer can set the mtime back, so the result is only certain
// for stats taken shortly after each other.
func (s fileStat) sameContent(later fileStat) bool {
	return s.inode == later.inode && s.mtime == later.mtime
}

// knownFiles are the files of a release that need no hashing, by entry of its index. It is safe for concurrent
// use.
type knownFiles struct {
	mu      sync.Mutex
	stats   []fileStat // nil: no file is known, and recordLink does nothing
	changed bool
}

// isUnchanged reports whether an entry's file is unchanged since it was last written or hashed.
func (k *knownFiles) isUnchanged(entry int, now *unix.Stat_t) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.stats != nil && k.stats[entry] != fileStat{} && k.stats[entry] == statOf(now)
}

// recordLink records that a verified file got another hard link, which changed its ctime.
func (k *knownFiles) recordLink(entry int, after *unix.Stat_t) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.stats != nil {
		k.stats[entry] = statOf(after)
		k.changed = true
	}
}

const (
	statsSuffix = ".stat"
	statsMagic  = "kedgest\x01"
	statSize    = 24
	// clockTick is longer than the tick of the coarsest clock of a file system. If a file is hashed sooner after a write,
	// another write may leave its ctime the same, so its stat isn't recorded. Files that only kedge can reach need no
	// such care.
	clockTick = 20 * time.Millisecond
)

// writeFileStats stores a release's stats. They are only a cache, so nothing is synced: if they are lost or damaged,
// the release is read again.
func (r *Releases) writeFileStats(name string, index deployments.Digest, stats []fileStat) error {
	data := append([]byte(statsMagic), index[:]...)
	for _, s := range stats {
		data = binary.LittleEndian.AppendUint64(data, s.inode)
		data = binary.LittleEndian.AppendUint64(data, uint64(s.mtime))
		data = binary.LittleEndian.AppendUint64(data, uint64(s.ctime))
	}
	sum := deployments.DigestOf(data)
	path := filepath.Join(r.private(), name+statsSuffix)
	aside := filepath.Join(r.private(), unfinishedPrefix+name+statsSuffix)
	if err := os.WriteFile(aside, append(data, sum[:]...), 0o600); err != nil {
		return err
	}
	return os.Rename(aside, path)
}

// readStats returns the stats that writeFileStats stored for a release with this index; nil if none can be used.
func (r *Releases) readStats(name string, index deployments.Digest) []fileStat {
	data, err := os.ReadFile(filepath.Join(r.private(), name+statsSuffix))
	end := len(data) - len(index)
	entries := (end - len(statsMagic) - len(index)) / statSize
	if err != nil || entries < 0 || end != len(statsMagic)+len(index)+entries*statSize {
		return nil
	}
	sum := deployments.DigestOf(data[:end])
	if !bytes.Equal(sum[:], data[end:]) || string(data[:len(statsMagic)]) != statsMagic ||
		!bytes.Equal(data[len(statsMagic):][:len(index)], index[:]) {
		return nil
	}
	stats := make([]fileStat, entries)
	for i := range stats {
		d := data[len(statsMagic)+len(index)+i*statSize:]
		stats[i] = fileStat{
			binary.LittleEndian.Uint64(d),
			int64(binary.LittleEndian.Uint64(d[8:])),
			int64(binary.LittleEndian.Uint64(d[16:])),
		}
	}
	return stats
}

// forgetStats removes the stats of all releases of this dest: they may share a file whose content was wrong.
func (r *Releases) forgetStats() error {
	found, err := filepath.Glob(globLiteral.Replace(r.private()) + "/*" + statsSuffix)
	for _, f := range found {
		err = errors.Join(err, os.Remove(f))
	}
	return err
}

// statTree returns the stats of the files of the tree at dir, by entry of x. The stat is zero for an empty file, and
// for a path that is missing, no regular file, or of another size than in x.
func statTree(ctx context.Context, dir string, x *archive.Index) ([]fileStat, error) {
	stats := make([]fileStat, len(x.Entries))
	return stats, addStats(ctx, dir, x, stats)
}

// addStats is statTree for those files whose element of stats is still zero: it sets these elements.
func addStats(ctx context.Context, dir string, x *archive.Index, stats []fileStat) error {
	top, err := safefs.OpenDir(dir)
	if err != nil {
		return err
	}
	defer top.Close()
	dirs := &safefs.Dirs{Top: top}
	defer dirs.Close()
	for i := range x.Entries {
		e := &x.Entries[i]
		if e.Kind != archive.File || e.Size == 0 || stats[i] != (fileStat{}) {
			continue
		}
		if i%1024 == 0 && ctx.Err() != nil {
			return ctx.Err()
		}
		var st unix.Stat_t
		at, name, err := dirs.At(e.Path)
		if err == nil {
			err = unix.Fstatat(at, name, &st, unix.AT_SYMLINK_NOFOLLOW)
		}
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ELOOP) {
			continue
		}
		if err != nil {
			return err
		}
		if st.Mode&unix.S_IFMT == unix.S_IFREG && st.Size == e.Size {
			stats[i] = statOf(&st)
		}
	}
	return nil
}

// keptStats keeps the live release's stats valid while other releases are removed: removing a hard link to a file
// changes its ctime.
type keptStats struct {
	r     *Releases
	name  string
	rec   *record
	index *archive.Index
	stats []fileStat
}

// keepStats returns the recorded stats of those files of the live release that are unchanged. It is
// called before other releases are removed, and saveNewCtimes afterwards. If no stats can be used,
// it returns nil, and saveNewCtimes does nothing.
func (r *Releases) keepStats(live *Release, rec *record) *keptStats {
	if live == nil {
		return nil
	}
	k := &keptStats{r: r, name: filepath.Base(live.Dir), rec: rec}
	data, err := r.readIndex(k.name, rec)
	if err == nil {
		k.index, err = archive.DecodeIndex(data)
	}
	if err != nil {
		return nil
	}
	if k.stats = r.readStats(k.name, rec.Index); len(k.stats) != len(k.index.Entries) {
		return nil
	}
	now, err := statTree(context.Background(), filepath.Join(r.top(), k.name), k.index)
	if err != nil {
		return nil
	}
	for i := range k.stats {
		if k.stats[i] != now[i] {
			k.stats[i] = fileStat{}
		}
	}
	return k
}

// saveNewCtimes records the files' new ctimes after other links to them were removed.
func (k *keptStats) saveNewCtimes() error {
	if k == nil {
		return nil
	}
	now, err := statTree(context.Background(), filepath.Join(k.r.top(), k.name), k.index)
	if err != nil {
		return err
	}
	for i := range now {
		if k.stats[i] == (fileStat{}) || !k.stats[i].sameContent(now[i]) {
			now[i] = fileStat{}
		}
	}
	return k.r.writeFileStats(k.name, k.rec.Index, now)
}
