package artifact

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"unicode/utf8"

	"golang.org/x/sys/unix"

	"kedge/artifact/archive"
	"kedge/artifact/safefs"
	"kedge/deployments"
	"kedge/deployments/durable"
)

const (
	// maxChanges bounds how many paths made by a release's commands are recorded.
	maxChanges = 65_536
	// maxExtra bounds how many paths of a tree that its archive lacks are listed. It isn't less than
	// maxChanges, as all paths that commands made are extra until they are recorded.
	maxExtra = maxChanges
	// maxChangeContent bounds, in bytes, a file that commands made and whose content is recorded for healing.
	// maxChangesContent bounds the content of all these files of a release together.
	maxChangeContent  = 64 << 10
	maxChangesContent = 4 << 20
)

// commandChange is a path of a live tree that the release's own commands made, changed or removed. From then on it
// belongs to the release: verify reports it only if it changes again, and healing restores it as far as it can. In
// changeRecord.before, it is a path that differed before the commands ran.
type commandChange struct {
	Path string `json:"path"` // "." is the tree itself
	// What is the kind of difference from the archive: one of the words of Difference.What.
	What string   `json:"what"`
	Type fileType `json:"type,omitempty"` // empty: it was removed

	Mode   fs.FileMode `json:"mode,omitempty"`
	UID    int         `json:"uid"`
	GID    int         `json:"gid"`
	Target string      `json:"target,omitempty"`
	// Sum is set if the path is a file of the archive whose content was changed: it is the new content's digest.
	Sum *deployments.Digest `json:"sum,omitempty"`
	// Content is the content of a small file. ContentKept is set if it was recorded.
	Content     []byte `json:"content,omitempty"`
	ContentKept bool   `json:"kept,omitempty"`
	// Inode and Mtime, in nanoseconds, tell whether something has written to the path since it was
	// recorded.
	Inode uint64 `json:"inode,omitempty"`
	Mtime int64  `json:"changed,omitempty"`
}

type fileType string

const (
	typeFile  fileType = "file"
	typeDir   fileType = "dir"
	typeLink  fileType = "link"
	typeOther fileType = "other"
)

// whole reports whether the commands made, replaced or removed the path with everything below it. It returns false if
// they only changed the path's content or attributes.
func (m *commandChange) whole() bool {
	return m.What == "extra" || m.What == "type" || m.What == "missing"
}

// isTransient reports whether the change is of a kind that running programs make and remove: a socket, a pipe, a pid
// or lock file.
func (m *commandChange) isTransient() bool {
	if m.Type == typeOther {
		return true
	}
	switch path.Ext(m.Path) {
	case ".pid", ".lock", ".sock", ".socket":
		return m.What == "extra" && m.Type == typeFile
	}
	return false
}

// changeRecord is the pair of files that record what a release's commands made.
type changeRecord struct {
	made string
	// before records the differences from before the commands ran, which the commands didn't make. It exists until the
	// commands are done.
	before string
}

const (
	changesSuffix = ".made"
	beforeSuffix  = ".before"
)

func (r *Releases) changeRecord(name string) changeRecord {
	return changeRecord{filepath.Join(r.private(), name+changesSuffix), filepath.Join(r.private(), name+beforeSuffix)}
}

// remove removes both files, if they exist.
func (f changeRecord) remove() error {
	var err error
	for _, p := range []string{f.made, f.before} {
		if failed := os.Remove(p); failed != nil && !errors.Is(failed, fs.ErrNotExist) {
			err = errors.Join(err, failed)
		}
	}
	return err
}

// readChanges reads what writeChanges wrote, without invalid paths; nil if the file is missing or damaged.
func readChanges(file string) []commandChange {
	var of struct {
		Made []commandChange `json:"made"`
	}
	data, err := os.ReadFile(file)
	if err != nil || json.Unmarshal(data, &of) != nil {
		return nil
	}
	return slices.DeleteFunc(of.Made,
		func(m commandChange) bool { return m.Path != "." && archive.CheckPath(m.Path) != nil })
}

func writeChanges(file string, made []commandChange) error {
	data, err := json.Marshal(map[string]any{"made": made})
	if err != nil {
		return err
	}
	return durable.WriteFile(file, data, 0o600)
}

// recordBefore records the differences of a tree before its release's commands run, without those that commands caused
// earlier. An existing record is kept, as the commands may have run since, and been cut off.
func (f changeRecord) recordBefore(dir string, differences []Difference) error {
	if safefs.Exists(f.before) {
		return nil
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return err
	}
	defer root.Close()
	known := readChanges(f.made)
	return writeChanges(f.before, describe(root, withoutChanges(root, known, differences, nil), false))
}

// recordAfter records what commands made in the tree at dir: the differences, except those that
// recordBefore recorded and that haven't changed since. If no difference is left, it removes both files.
// left counts the paths beyond maxChanges, which aren't recorded.
func (f changeRecord) recordAfter(dir string, differences []Difference) (left int, err error) {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return 0, err
	}
	defer root.Close()
	before := map[string]commandChange{}
	for _, m := range readChanges(f.before) {
		before[m.Path] = m
	}
	made := describe(root, differences, true)
	made = slices.DeleteFunc(made, func(m commandChange) bool {
		was, there := before[m.Path]
		return there && was.Inode == m.Inode && was.Mtime == m.Mtime
	})
	left = max(0, len(made)-maxChanges)
	if made = made[:len(made)-left]; len(made) == 0 {
		return 0, f.remove()
	}
	if err := writeChanges(f.made, made); err != nil {
		return 0, err
	}
	if err := os.Remove(f.before); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return 0, err
	}
	return left, nil
}

// describe returns the current state of each path of differences, once for each path. It leaves out
// paths below one that is whole, paths removed meanwhile, and paths that aren't UTF-8, which JSON
// can't hold. If keep is set, it records the new content of small files.
func describe(root *os.Root, differences []Difference, keep bool) []commandChange {
	differences = slices.Clone(differences)
	slices.SortStableFunc(differences, func(a, b Difference) int { return cmp.Compare(a.Path, b.Path) })
	var found []commandChange
	whole := pathSet{}
	kept := 0
	for i := 0; i < len(differences); {
		p, what := differences[i].Path, differences[i].What
		content := false
		for ; i < len(differences) && differences[i].Path == p; i++ {
			content = content || differences[i].What == "content"
			if w := differences[i].What; w == "type" || w == "extra" || w == "missing" {
				what = w
			}
		}
		if whole.covers(p) || !utf8.ValidString(p) {
			continue
		}
		m := changeAt(root, p)
		if m.What = what; m.whole() {
			whole.add(p)
		}
		if m.Type == "" && what != "missing" {
			continue // it was removed meanwhile
		}
		if keep && m.Type == typeFile && (content || m.whole()) {
			m.keepContent(root, &kept, content)
		}
		found = append(found, m)
	}
	return found
}

// changeAt describes what exists at a path. Type is empty if nothing exists there, or if lstat fails.
func changeAt(root *os.Root, p string) commandChange {
	m := commandChange{Path: p}
	info, err := root.Lstat(p)
	if err != nil {
		return m
	}
	m.Type, m.Mode = typeOther, info.Mode()&(fs.ModePerm|fs.ModeSticky|fs.ModeSetgid)
	switch info.Mode().Type() {
	case 0:
		m.Type = typeFile
	case fs.ModeDir:
		m.Type = typeDir
	case fs.ModeSymlink:
		m.Type, m.Mode = typeLink, 0
		m.Target, _ = root.Readlink(p)
	}
	if st, ok := info.Sys().(*syscall.Stat_t); ok {
		m.UID, m.GID, m.Inode, m.Mtime = int(st.Uid), int(st.Gid), st.Ino, st.Mtim.Nano()
	}
	return m
}

// keepContent records a file's content if it is small and maxChangesContent leaves room, and adds its size to kept. If
// changed says that the archive has other content, the digest is recorded, too, whatever the file's size.
func (m *commandChange) keepContent(root *os.Root, kept *int, changed bool) {
	if changed {
		sum, err := sumOf(root, m.Path)
		if err != nil {
			return
		}
		m.Sum = &sum
	}
	data, err := readSmall(root, m.Path, maxChangeContent)
	if err != nil || *kept+len(data) > maxChangesContent || m.Sum != nil && deployments.DigestOf(data) != *m.Sum {
		return
	}
	*kept += len(data)
	m.Content, m.ContentKept = data, true
}

var errTooLarge = errors.New("it is too large")

// openRegular opens a regular file. It fails if anything else lies at the path.
func openRegular(root *os.Root, p string) (*os.File, error) {
	f, err := root.OpenFile(p, os.O_RDONLY|unix.O_NONBLOCK|unix.O_NOFOLLOW, 0)
	if err != nil {
		return nil, err
	}
	if info, err := f.Stat(); err != nil || !info.Mode().IsRegular() {
		f.Close()
		return nil, errors.Join(err, fs.ErrInvalid)
	}
	return f, nil
}

func readSmall(root *os.Root, p string, most int64) ([]byte, error) {
	f, err := openRegular(root, p)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, most+1))
	if err == nil && int64(len(data)) > most {
		err = errTooLarge
	}
	return data, err
}

func sumOf(root *os.Root, p string) (deployments.Digest, error) {
	f, err := openRegular(root, p)
	if err != nil {
		return deployments.Digest{}, err
	}
	defer f.Close()
	return hashSlowly(context.Background(), f, nil, make([]byte, 64<<10))
}

// sameContent reports whether a path is a file with the same content in both trees. The only error is the end of ctx.
func sameContent(ctx context.Context, a, b *os.Root, p string) (bool, error) {
	var sums [2]deployments.Digest
	buffer := make([]byte, 64<<10)
	for i, root := range []*os.Root{a, b} {
		f, err := openRegular(root, p)
		if err != nil {
			return false, ctx.Err() // it was replaced or removed meanwhile
		}
		sums[i], err = hashSlowly(ctx, f, nil, buffer)
		f.Close()
		if err != nil {
			return false, ctx.Err()
		}
	}
	return sums[0] == sums[1], nil
}

// inherited reports whether now, a directory's mode, has set-group-id in addition to the recorded mode, and no other
// difference. A new directory inherits that bit from its parent.
func (m *commandChange) inherited(now fs.FileMode) bool {
	return m.Type == typeDir && now == m.Mode|fs.ModeSetgid
}

// difference returns the first difference between m's path and how the commands left it, in a word of Difference.What;
// empty: none. It compares content if its digest was recorded, and the owner if only that was changed. A path that
// isTransient may be missing, or have changed in all but its type.
func (m *commandChange) difference(root *os.Root) string {
	now := changeAt(root, m.Path)
	switch {
	case m.Type == "" && now.Type == "":
		return ""
	case m.Type == "":
		return "extra"
	case m.isTransient() && (now.Type == "" || now.Type == m.Type):
		return ""
	case now.Type == "":
		return "missing"
	case now.Type != m.Type:
		return "type"
	case now.Target != m.Target:
		return "link"
	case now.Mode != m.Mode && !m.inherited(now.Mode):
		return "mode"
	case m.What == "owner" && (now.UID != m.UID || now.GID != m.GID):
		return "owner"
	case m.Sum != nil:
		if sum, err := sumOf(root, m.Path); err != nil || sum != *m.Sum {
			return "content"
		}
	}
	return ""
}

// withoutChanges returns the differences of a tree that its release's commands didn't cause, by the record in made. It
// adds how the paths in made have changed since the commands left them, but for mounts and what lies below them.
func withoutChanges(root *os.Root, made []commandChange, differences []Difference, mounts []string) []Difference {
	if len(made) == 0 {
		return differences
	}
	changed, attributes, whole := pathSet{}, pathSet{}, wholePaths(made)
	var found []Difference
	for i := range made {
		m := &made[i]
		switch {
		case m.whole():
		case m.Sum != nil || m.What == "link":
			changed.add(m.Path)
		default:
			attributes.add(m.Path)
		}
		if isBelow(m.Path, mounts) {
			continue
		}
		if what := m.difference(root); what != "" {
			found = append(found, Difference{m.Path, what})
		}
	}
	for _, d := range differences {
		theirs := attributes[d.Path] && (d.What == "mode" || d.What == "owner")
		if !theirs && !changed[d.Path] && !whole.covers(d.Path) {
			found = append(found, d)
		}
	}
	slices.SortStableFunc(found, func(a, b Difference) int { return archive.ComparePaths(a.Path, b.Path) })
	return found
}

// wholePaths returns the paths that the commands made, replaced or removed with everything below them.
func wholePaths(made []commandChange) pathSet {
	whole := pathSet{}
	for i := range made {
		if made[i].whole() {
			whole.add(made[i].Path)
		}
	}
	return whole
}

// pathSet is a set of paths.
type pathSet map[string]bool

func (s pathSet) add(p string) { s[p] = true }

// covers reports whether p or a directory above it is in the set.
func (s pathSet) covers(p string) bool {
	for {
		if s[p] {
			return true
		}
		i := strings.LastIndexByte(p, '/')
		if i < 0 {
			return false
		}
		p = p[:i]
	}
}

// withoutChangesAt returns withoutChanges of the differences of the tree at dir.
func withoutChangesAt(
	dir string,
	made []commandChange,
	differences []Difference,
	mounts []string,
) ([]Difference, error) {
	if len(made) == 0 {
		return differences, nil
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, fmt.Errorf("comparing what the release's commands made: %w", err)
	}
	defer root.Close()
	return withoutChanges(root, made, differences, mounts), nil
}
