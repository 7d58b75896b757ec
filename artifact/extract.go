package artifact

import (
	"archive/tar"
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path"
	"slices"
	"strconv"
	"strings"
	"time"

	"kedge/artifact/archive"
	"kedge/artifact/safefs"
	"kedge/deployments"
	"kedge/deployments/safetext"
)

// Bounds for an archive without an index, whose size isn't known beforehand.
const (
	maxTarEntries = 4 << 20
	maxUnpacked   = 256 << 30 // bytes
	maxEntryName  = 4096      // bytes
	shownName     = 120       // bytes of a name in an error
	// maxNames bounds the bytes of directory and link names that are kept in memory.
	maxNames = 256 << 20
	// maxOwners bounds how many names of users are kept in memory, and how many of groups.
	maxOwners = 1000
	// maxGrowth bounds the bytes that an archive decodes to, as a multiple of its size; freeGrowth bytes are allowed in
	// any case. Text shrinks to a tenth, a decompression bomb to a thousandth. The sum of directories and files, which
	// may be sparse, has the same bound.
	maxGrowth  = 400
	freeGrowth = 1 << 30
	dirSize    = 4096 // bytes counted for a directory
	// maxWindow bounds the memory for a zstd frame's window: that of zstd --long=27.
	maxWindow = 128 << 20
)

// extractor writes the entries of one archive.
type extractor struct {
	ctx    context.Context
	root   *os.Root
	owners bool // entries get the archive's owners
	// checkOwner returns an error if an entry may not belong to a user and group; nil: any owner is
	// allowed.
	checkOwner func(uid, gid int) error
	// uids and gids cache looked-up users and groups; -1: this machine doesn't know the name.
	uids, gids map[string]int
	manifest   *deployments.Manifest
	// symlinks says where symbolic links may lead.
	symlinks deployments.Symlinks
	left     int64           // bytes that the tree may still grow by
	count    int             // entries, and directories without an entry
	nonEmpty bool            // set once the tree has something but its top directory
	names    int             // bytes of the names kept in the maps below
	links    map[string]bool // symbolic links made so far
	// top has the attributes of the tree itself; nil: the archive has no entry for it.
	top *attributes
	// dirs has the attributes of each directory made so far; nil: the archive has no entry for it. Modes are set at the
	// end, as a read-only directory could not be filled.
	dirs map[string]*attributes
}

// attributes are the header fields that are applied after an entry's content. Keeping the whole header would keep
// all its PAX records, of up to 1 MiB.
type attributes struct {
	uid, gid int
	mode     fs.FileMode
	time     time.Time
}

// attributesOf returns the owner, mode and time for an entry. As with tar, the name of a user or
// group takes precedence over its number if this machine knows the name. A directory keeps
// set-group-id and the sticky bit. If checkOwner refuses the owner, its error is returned.
func (x *extractor) attributesOf(h *tar.Header) (*attributes, error) {
	a := &attributes{h.Uid, h.Gid, fs.FileMode(h.Mode).Perm(), h.ModTime}
	if h.Typeflag == tar.TypeDir {
		for bit, mode := range map[int64]fs.FileMode{0o2000: fs.ModeSetgid, 0o1000: fs.ModeSticky} {
			if h.Mode&bit != 0 {
				a.mode |= mode
			}
		}
	}
	if !x.owners {
		return a, nil
	}
	if uid := idCached(x.uids, h.Uname, safefs.LookupUID); uid >= 0 {
		a.uid = uid
	}
	if gid := idCached(x.gids, h.Gname, safefs.LookupGID); gid >= 0 {
		a.gid = gid
	}
	if x.checkOwner != nil {
		return a, x.checkOwner(a.uid, a.gid)
	}
	return a, nil
}

// idCached returns the number of a user or group, or -1 if lookup doesn't find name. It caches up to maxOwners names
// in known.
func idCached(known map[string]int, name string, lookup func(string) (string, error)) int {
	if name == "" {
		return -1
	}
	if id, ok := known[name]; ok {
		return id
	}
	id := -1
	if text, err := lookup(name); err == nil {
		if n, err := strconv.ParseUint(text, 10, 31); err == nil {
			id = int(n)
		}
	}
	if len(known) < maxOwners {
		known[strings.Clone(name)] = id
	}
	return id
}

var (
	errBomb = fmt.Errorf("the archive unpacks to more than %d times its size, or more than %d GiB: "+
		"refused as a decompression bomb", maxGrowth, maxUnpacked>>30)
	errEntries = fmt.Errorf("the archive has more than %d entries", maxTarEntries)
	errNames   = fmt.Errorf("the names of the archive's directories and symbolic links have more than %d bytes in total",
		maxNames)
)

// bounded is a reader that fails with errBomb once more than left bytes were read.
type bounded struct {
	r    io.Reader
	left int64
}

func (b *bounded) Read(p []byte) (int, error) {
	n, err := b.r.Read(p)
	if b.left -= int64(n); b.left < 0 {
		return 0, errBomb
	}
	return n, err
}

// archive unpacks raw, whose first bytes tell its format. Input of no known format is written as
// one file, unless single refuses it.
func (x *extractor) archive(raw *bufio.Reader, name string) error {
	content, name, free, err := decompress(raw, name, x.left)
	if err != nil {
		return cutOff(err)
	}
	defer free()
	// An empty archive is two blocks of zeros, or nothing at all.
	block, err := content.Peek(512)
	switch {
	case len(block) == 512 && (bytes.HasPrefix(block[257:], []byte("ustar")) || oldTar(block) || !slices.ContainsFunc(block, func(b byte) bool { return b != 0 })):
		err = x.tar(content)
	case err != nil && !errors.Is(err, io.EOF):
	case len(block) == 0:
		err = errors.New("it is empty")
	default:
		err = x.single(content, name, block)
	}
	return cutOff(err)
}

// cutOff rewords the decoders' errors for a truncated archive.
func cutOff(err error) error {
	if errors.Is(err, io.ErrUnexpectedEOF) {
		return fmt.Errorf("the archive is cut off: %w", err)
	}
	return err
}

// oldTar reports whether a block is the header of a tar from before POSIX: without a magic number, but with a
// valid checksum.
func oldTar(block []byte) bool {
	_, err := tar.NewReader(bytes.NewReader(append(slices.Clone(block), make([]byte, 1024)...))).Next()
	return err == nil
}

func (x *extractor) tar(r *bufio.Reader) error {
	t := tar.NewReader(r)
	for {
		if err := x.ctx.Err(); err != nil {
			return err
		}
		h, err := t.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return err
		}
		if err := x.entry(t, h); err != nil {
			return fmt.Errorf("entry %q: %w", safetext.Cut(h.Name, shownName), err)
		}
	}
	// After the end there are zeros, up to the block size of the tape.
	buf := make([]byte, 32<<10)
	for {
		n, err := r.Read(buf)
		if slices.ContainsFunc(buf[:n], func(b byte) bool { return b != 0 }) {
			return errors.New("data follows the end of the archive")
		}
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return err
		}
	}
	if !x.nonEmpty {
		return errors.New("the archive is empty: nothing would be left at dest")
	}
	inner := slices.Sorted(maps.Keys(x.dirs)) // sorted, a directory comes before its content
	slices.Reverse(inner)
	for _, name := range inner {
		if x.dirs[name] == nil {
			continue
		}
		if err := x.finish(name, x.dirs[name]); err != nil {
			return fmt.Errorf("entry %q: %w", safetext.Cut(name, shownName), err)
		}
	}
	if x.top == nil {
		return nil
	}
	return x.chown(".", x.top) // dest_mode of the manifest sets its mode
}

// localName returns an entry's path in the tree, or an error if it must not have that path. "" is the tree itself.
func (x *extractor) localName(name string) (string, error) {
	switch {
	case strings.HasPrefix(name, "/"):
		return "", errors.New("its name is absolute")
	case strings.ContainsAny(name, "\x00\n"):
		return "", errors.New("its name has a NUL or a line break")
	case len(name) > maxEntryName:
		return "", fmt.Errorf("its name has %d bytes, at most %d are allowed", len(name), maxEntryName)
	case slices.Contains(strings.Split(name, "/"), ".."):
		return "", errors.New("its name has .. in it, which could lead out of the release")
	}
	clean := path.Clean(name)
	if clean == "." {
		return "", nil
	}
	if strings.Count(clean, "/") >= archive.MaxLevels {
		return "", fmt.Errorf("it lies more than %d directories deep", archive.MaxLevels-1)
	}
	for dir := path.Dir(clean); dir != "."; dir = path.Dir(dir) {
		if x.links[dir] {
			return "", fmt.Errorf("its path leads through the symbolic link %q of the same archive",
				safetext.Cut(dir, shownName))
		}
	}
	return clean, nil
}

func (x *extractor) entry(r io.Reader, h *tar.Header) error {
	if x.count++; x.count > maxTarEntries {
		return errEntries
	}
	switch h.Typeflag {
	case tar.TypeXGlobalHeader:
		return nil
	case tar.TypeReg, tar.TypeDir, tar.TypeSymlink, tar.TypeLink, tar.TypeGNUSparse:
	case tar.TypeChar, tar.TypeBlock, tar.TypeFifo:
		return errors.New("it is a device or a pipe, which a release may not have")
	default:
		return fmt.Errorf("its type %q is not one that a release may have", h.Typeflag)
	}
	if h.Mode&0o4000 != 0 ||
		h.Mode&0o2000 != 0 && h.Typeflag != tar.TypeDir { // on a directory, set-group-id gives no rights
		return errors.New("it is setuid, or a setgid file, which a release may not have")
	}
	if h.Size < 0 || h.Size > x.left {
		return errBomb
	}
	name, err := x.localName(h.Name)
	if err != nil {
		return err
	}
	a, err := x.attributesOf(h)
	if err != nil {
		return err
	}
	if name == "" {
		if h.Typeflag != tar.TypeDir {
			return errors.New("it names the top of the tree, and is not a directory")
		}
		x.top = a
		return nil
	}
	x.nonEmpty = true
	if err := x.parents(path.Dir(name)); err != nil {
		return err
	}
	if h.Typeflag == tar.TypeDir {
		if err := x.root.Mkdir(name, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
		if info, err := x.root.Lstat(name); err != nil || !info.IsDir() {
			return errors.Join(errors.New("it is a directory, but an earlier entry of the same name is not"), err)
		}
		_, there := x.dirs[name]
		name, err := x.keep(name)
		if x.dirs[name] = a; err != nil || there {
			return err
		}
		return x.chargeDir()
	}
	// As with tar, a later entry of the same name replaces an earlier one. Directories are not replaced, as they
	// may have content.
	if info, err := x.root.Lstat(name); err == nil {
		if info.IsDir() {
			return errors.New("it would replace a directory")
		}
		if err := x.root.Remove(name); err != nil {
			return err
		}
		delete(x.links, name)
	}
	switch h.Typeflag {
	case tar.TypeSymlink:
		if err := archive.CheckTarget(name, h.Linkname, x.symlinks); err != nil {
			return err
		}
		name, err := x.keep(name)
		if err != nil {
			return err
		}
		x.links[name] = true
		if err := x.root.Symlink(h.Linkname, name); err != nil {
			return err
		}
		return x.chown(name, a)
	case tar.TypeLink:
		target, err := x.localName(h.Linkname)
		if err != nil {
			return fmt.Errorf("it is a hard link to %q: %w", safetext.Cut(h.Linkname, shownName), err)
		}
		info, err := x.root.Lstat(target)
		if err != nil || !info.Mode().IsRegular() {
			return fmt.Errorf("it is a hard link to %q, which is not an earlier file of the archive",
				safetext.Cut(h.Linkname, shownName))
		}
		return x.root.Link(target, name)
	}
	if err := x.write(name, r); err != nil {
		return err
	}
	return x.finish(name, a)
}

// parents makes dir, the directory of an entry, and those above dir, unless they exist. Directories made here count
// towards the bound of entries, as one long name may need many.
func (x *extractor) parents(dir string) error {
	if _, there := x.dirs[dir]; there || dir == "." {
		return nil
	}
	if err := x.root.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	dir, err := x.keep(dir)
	for ; err == nil && dir != "."; dir = path.Dir(dir) {
		if _, there := x.dirs[dir]; there {
			break
		}
		x.dirs[dir] = nil
		if x.count++; x.count > maxTarEntries {
			err = errEntries
		} else {
			err = x.chargeDir()
		}
	}
	return err
}

// chargeDir counts a new directory, which takes space on the disk but none in the archive.
func (x *extractor) chargeDir() error {
	if x.left -= dirSize; x.left < 0 {
		return errBomb
	}
	return nil
}

// keep returns a copy of name, which may be a slice of a far longer PAX record that would stay in memory. If the kept
// names have more than maxNames bytes in total, the error is errNames.
func (x *extractor) keep(name string) (string, error) {
	if x.names += len(name); x.names > maxNames {
		return name, errNames
	}
	return strings.Clone(name), nil
}

// write copies r to a new file, and deducts the file's size from left. If left doesn't suffice, the error is errBomb.
func (x *extractor) write(name string, r io.Reader) (err error) {
	f, err := x.root.OpenFile(name, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	n, err := io.Copy(f, io.LimitReader(r, x.left+1))
	if x.left -= n; err == nil && x.left < 0 {
		err = errBomb
	}
	return err
}

// finish sets an entry's mode, its owner if x.owners is set, and its time if that is after 1970-01-01.
func (x *extractor) finish(name string, a *attributes) error {
	if err := x.chown(name, a); err != nil {
		return err
	}
	if err := x.root.Chmod(name, a.mode); err != nil {
		return err
	}
	if a.time.Unix() <= 0 {
		return nil
	}
	return x.root.Chtimes(name, a.time, a.time)
}

func (x *extractor) chown(name string, a *attributes) error {
	if !x.owners {
		return nil
	}
	return x.root.Lchown(name, a.uid, a.gid)
}

// checkSingleFile returns an error if rsync would replace two or more files and directories of dest by the single file
// name. The input may be an error page instead of an archive. Files named like an entry of dest are accepted, and so is
// every other strategy: release, for one, keeps the old directory.
func checkSingleFile(m *deployments.Manifest, name string) error {
	if m.Strategy != deployments.StrategyRsync {
		return nil
	}
	entries, err := os.ReadDir(m.Dest)
	if err != nil {
		return nil // dest has nothing to lose
	}
	others := 0
	for _, e := range entries {
		if e.Name() == name {
			return nil
		}
		if e.IsDir() || e.Type().IsRegular() {
			others++
		}
	}
	if others < 2 {
		return nil
	}
	return fmt.Errorf("it is no archive, and as a single file would replace the %d entries of %s: "+
		"if that is meant, set sync_strategy: release, or move the directory away first", others, m.Dest)
}

// namedAsTar reports whether a file is named as a tar archive, in any compression: as a single file it would replace a
// whole tree. Some compressions, such as brotli's, have no magic number.
func namedAsTar(name string) bool {
	ending := path.Ext(name)
	return ending == ".tar" || path.Ext(strings.TrimSuffix(name, ending)) == ".tar" ||
		slices.Contains([]string{".tgz", ".tzst", ".tbz", ".tbz2", ".txz", ".tlz", ".tbr"}, ending)
}

// single writes input that is no archive as one file under its own name, executable if it is a
// program. It is an error if the name is empty or that of a tar archive, or if checkSingleFile
// refuses the file.
func (x *extractor) single(r io.Reader, name string, head []byte) error {
	if name == "" || name == "." || name == "/" {
		return errors.New("it is no archive, and can't be written as a single file, as its URL ends in no file name: " +
			"want a tar archive, or a URL that ends in the file's name")
	}
	if namedAsTar(name) {
		return errors.New("it is named as a tar archive, but is none, or is in a compression that kedge does not read: " +
			"want .tar, .tar.gz, .tar.zst, .tar.bz2 or .tar.xz")
	}
	if err := checkSingleFile(x.manifest, name); err != nil {
		return err
	}
	mode := fs.FileMode(0o644)
	if bytes.HasPrefix(head, []byte("#!")) || bytes.HasPrefix(head, []byte("\x7fELF")) {
		mode = 0o755
	}
	if err := x.write(name, r); err != nil { // head is the reader's buffer, and has other bytes from here on
		return err
	}
	return x.root.Chmod(name, mode)
}
