package dir

import (
	"encoding/binary"
	"hash/fnv"
	"io"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"kedge/deployments"
	"kedge/deployments/durable"
	"kedge/kv"
)

// fileValue is the content of one key's file.
type fileValue struct {
	value   []byte
	version uint64
	modTime time.Time
}

// readValue reads a file, but at most one byte more than Consul accepts for a value. Of a longer file it returns that
// beginning and no error: an error would hide all keys beside it, and keep a commit from replacing the file. Package
// deployments refuses such records, pins, orders and reports by their size. The version is computed from what was read
// and from the file's metadata, because people who edit the file don't count versions.
func readValue(path string) (fileValue, error) {
	f, err := os.Open(path)
	if err != nil {
		return fileValue{}, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return fileValue{}, err
	}
	value, err := io.ReadAll(io.LimitReader(f, maxFileValue+1))
	if err != nil {
		return fileValue{}, err
	}
	h := fnv.New64a()
	var stat [16]byte
	binary.LittleEndian.PutUint64(stat[:8], uint64(info.ModTime().UnixNano()))
	if sys, ok := info.Sys().(*syscall.Stat_t); ok {
		binary.LittleEndian.PutUint64(stat[8:], sys.Ino)
	}
	h.Write(stat[:])
	h.Write(value)
	return fileValue{value: value, version: max(h.Sum64(), 1), modTime: info.ModTime()}, nil
}

// find returns the path of the file that holds a key's value, and whether the key has one.
func (d *Store) find(key string) (string, bool) {
	if all := d.files(key); len(all) > 0 {
		return all[0], true
	}
	return "", false
}

// files returns the paths of a key's files. The first holds the value. There are more if a person made a directory
// twice, with and without the @.
func (d *Store) files(key string) (all []string) {
	var in func(dir string, parts []string)
	in = func(dir string, parts []string) {
		path := filepath.Join(dir, parts[0])
		if len(parts) == 1 {
			if isFile(path) {
				all = append(all, path)
			}
			return
		}
		for _, folder := range []string{path, path + "@"} {
			if isDir(folder) {
				in(folder, parts[1:])
			}
		}
	}
	in(d.dir, strings.Split(key, "/"))
	return all
}

// preparePath returns the file to write a key to, creates its directories, and moves a directory of its name aside.
func (d *Store) preparePath(key string) (string, error) {
	if path, ok := d.find(key); ok {
		return path, nil
	}
	dir, parts := d.dir, strings.Split(key, "/")
	for i := range parts[:len(parts)-1] {
		var err error
		if dir, err = d.ensureDir(dir, parts[:i+1]); err != nil {
			return "", err
		}
	}
	path := filepath.Join(dir, parts[len(parts)-1])
	if isDir(path) {
		d.step("make room for " + key)
		if err := moveAside(path, path+"@"); err != nil {
			return "", err
		}
	}
	return path, nil
}

// ensureDir returns the directory below dir that holds the keys below the key made of parts, and
// creates it if necessary.
func (d *Store) ensureDir(dir string, parts []string) (string, error) {
	plain := filepath.Join(dir, parts[len(parts)-1])
	marked := plain + "@"
	if isDir(marked) {
		return marked, nil
	}
	if isDir(plain) {
		return plain, nil
	}
	made := plain
	if _, err := os.Lstat(plain); err == nil || isUnitPin(parts) {
		made = marked
	}
	if err := os.Mkdir(made, 0o755); err != nil {
		return "", err
	}
	return made, durable.SyncDir(dir)
}

// isUnitPin reports whether the key made of parts is the pin of a unit: it may have keys below it,
// the pins of nodes.
func isUnitPin(parts []string) bool {
	return len(parts) == 4 && parts[0]+"/" == kv.PinsPrefix
}

// moveAside moves all of a directory's content into another, which may exist. A file replaces one of the same name.
func moveAside(from, to string) error {
	if !isDir(to) {
		return os.Rename(from, to)
	}
	files, err := os.ReadDir(from)
	if err != nil {
		return err
	}
	for _, f := range files {
		src, dst := filepath.Join(from, f.Name()), filepath.Join(to, f.Name())
		if f.IsDir() && isDir(dst) {
			err = moveAside(src, dst)
		} else {
			err = os.Rename(src, dst)
		}
		if err != nil {
			return err
		}
	}
	return os.Remove(from)
}

// ignoredFile reports whether a name can't be part of a key, such as that of a hidden file or of an editor's backup.
func ignoredFile(name string) bool { return deployments.CheckSegment("file", name) != nil }

// exists reports whether the store's directory exists. It may be a symbolic link, unlike the directories below it.
func (d *Store) exists() bool {
	info, err := os.Stat(d.dir)
	return err == nil && info.IsDir()
}

func isFile(path string) bool {
	info, err := os.Lstat(path)
	return err == nil && info.Mode().IsRegular()
}

func isDir(path string) bool {
	info, err := os.Lstat(path)
	return err == nil && info.IsDir()
}
