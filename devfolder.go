package main

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/user"
	"path/filepath"
	"strconv"
	"syscall"
)

// A devFolder is where the private PostgreSQL and the generated secret live.
type devFolder struct {
	path    string
	account *syscall.Credential // whom the programs run as; nil: ourselves
}

// openDevFolder returns .taskflow in the working directory, made if need be. PostgreSQL refuses to
// run as root: then it runs as an unprivileged user, and where that user cannot reach the working
// directory, the folder is in /var/lib.
func openDevFolder() (devFolder, error) {
	cwd, err := os.Getwd()
	if err != nil {
		return devFolder{}, err
	}
	f := devFolder{path: filepath.Join(cwd, ".taskflow")}
	if os.Getuid() == 0 {
		if f.account, err = unprivileged(f.path); err != nil {
			return f, err
		}
		if !reachable(cwd, f.account) {
			f.path = fmt.Sprintf("/var/lib/taskflow-%.6x", sha256.Sum256([]byte(cwd)))
			if f.account, err = unprivileged(f.path); err != nil {
				return f, err
			}
		}
	}
	return f, f.prepare()
}

// prepare makes the folder private, and the account's.
func (f devFolder) prepare() error {
	if err := os.Mkdir(f.path, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	if info, err := os.Lstat(f.path); err != nil || !info.IsDir() {
		return errors.Join(fmt.Errorf("%s must be a folder", f.path), err)
	}
	if f.account != nil {
		if err := os.Chown(f.path, int(f.account.Uid), int(f.account.Gid)); err != nil {
			return err
		}
	}
	if err := os.Chmod(f.path, 0o700); err != nil {
		return fmt.Errorf("%w: the folder belongs to somebody else; remove it, or work somewhere else", err)
	}
	return nil
}

// unprivileged returns the owner of folder if it exists and is not root's, else postgres or nobody.
func unprivileged(folder string) (*syscall.Credential, error) {
	if info, err := os.Stat(folder); err == nil {
		if owner := info.Sys().(*syscall.Stat_t); owner.Uid != 0 {
			return &syscall.Credential{Uid: owner.Uid, Gid: owner.Gid}, nil
		}
	}
	for _, name := range []string{"postgres", "nobody"} {
		if u, err := user.Lookup(name); err == nil {
			uid, _ := strconv.ParseUint(u.Uid, 10, 32)
			gid, _ := strconv.ParseUint(u.Gid, 10, 32)
			return &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}, nil
		}
	}
	return nil, errors.New("PostgreSQL does not run as root, and there is neither a user postgres nor nobody: start as an ordinary user")
}

// reachable reports whether the account can work in dir, by having it do so.
func reachable(dir string, account *syscall.Credential) bool {
	return devFolder{dir, account}.command(context.Background(), "true").Run() == nil
}

// developmentSecret returns the secret that is kept in the folder, made at the first call. The file is locked
// meanwhile, so that processes which start together end with the same one.
func developmentSecret() ([]byte, error) {
	f, err := openDevFolder()
	if err != nil {
		return nil, err
	}
	file, err := lock(filepath.Join(f.path, "secret"), 0)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	secret, err := io.ReadAll(file)
	if err == nil && len(secret) == 0 {
		secret = []byte(rand.Text() + rand.Text())
		_, err = file.Write(secret)
	}
	if err == nil && len(secret) < minSecret {
		err = fmt.Errorf("%s is too short: remove it", file.Name())
	}
	return secret, err
}
