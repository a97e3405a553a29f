package main

import (
	"github.com/assay-id/assay/conf"
	"github.com/assay-id/assay/server/ca/vault"
)

// vaultClient opens what the file says of Vault.
func vaultClient(from *conf.Vault) (*vault.Client, error) {
	cfg := vault.Config{Address: from.Address, Namespace: from.Namespace, CAPath: from.CAPath}
	if a := from.Token; a != nil {
		cfg.Token = &vault.TokenAuth{Token: a.Token, Path: a.Path}
	}
	if a := from.AppRole; a != nil {
		cfg.AppRole = &vault.AppRoleAuth{Mount: a.Mount, RoleID: a.ID, SecretID: a.Secret, SecretPath: a.SecretPath}
	}
	if a := from.Cert; a != nil {
		cfg.Cert = &vault.CertAuth{Mount: a.Mount, Role: a.Role, CertPath: a.CertPath, KeyPath: a.KeyPath}
	}
	if a := from.K8s; a != nil {
		cfg.K8s = &vault.K8sAuth{Mount: a.Mount, Role: a.Role, TokenPath: a.TokenPath}
	}
	return vault.New(cfg)
}
