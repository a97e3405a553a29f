package kube

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"os"
	"time"
)

// makeKeys makes the certificates and kubeconfigs of the parts and of an administrator.
func (c *Cluster) makeKeys() error {
	if err := os.MkdirAll(c.path("pki"), 0o755); err != nil {
		return err
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	ca := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "lab-ca"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
	}
	if err := c.write("ca", ca, ca, key, key); err != nil {
		return err
	}
	accounts, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		return err
	}
	if err := c.writeKey("sa", accounts); err != nil {
		return err
	}
	for i, one := range []struct {
		name, cn, group string
		ips             []string
		dns             []string
	}{
		{"apiserver", "kube-apiserver", "", []string{NodeIP, serviceIP, "127.0.0.1"}, []string{"localhost", "kubernetes", "kubernetes.default", "kubernetes.default.svc"}},
		{"kubelet-server", NodeName, "", []string{NodeIP}, []string{NodeName}},
		{"admin", "admin", "system:masters", nil, nil},
		{"kubelet", "system:node:" + NodeName, "system:nodes", nil, nil},
		{"kcm", "system:kube-controller-manager", "", nil, nil},
		{"sched", "system:kube-scheduler", "", nil, nil},
		{"proxy", "system:kube-proxy", "", nil, nil},
	} {
		own, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			return err
		}
		cert := &x509.Certificate{
			SerialNumber: big.NewInt(int64(i) + 2), Subject: pkix.Name{CommonName: one.cn}, DNSNames: one.dns,
			NotBefore: ca.NotBefore, NotAfter: ca.NotAfter, KeyUsage: x509.KeyUsageDigitalSignature,
			ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
		}
		if one.group != "" {
			cert.Subject.Organization = []string{one.group}
		}
		for _, ip := range one.ips {
			cert.IPAddresses = append(cert.IPAddresses, net.ParseIP(ip))
		}
		if err := c.write(one.name, cert, ca, own, key); err != nil {
			return err
		}
		config := fmt.Sprintf(`apiVersion: v1
kind: Config
clusters: [{name: lab, cluster: {server: "https://%s:6443", certificate-authority: %s}}]
users: [{name: %s, user: {client-certificate: %s, client-key: %s}}]
contexts: [{name: lab, context: {cluster: lab, user: %[3]s}}]
current-context: lab
`, NodeIP, c.CA(), one.name, c.path("pki", one.name+".crt"), c.path("pki", one.name+".key"))
		if err := os.WriteFile(c.Kubeconfig(one.name), []byte(config), 0o600); err != nil {
			return err
		}
	}
	return nil
}

func (c *Cluster) write(name string, cert, ca *x509.Certificate, own, signer crypto.Signer) error {
	der, err := x509.CreateCertificate(rand.Reader, cert, ca, own.Public(), signer)
	if err != nil {
		return err
	}
	text := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	if err := os.WriteFile(c.path("pki", name+".crt"), text, 0o644); err != nil { // certificates are public
		return err
	}
	return c.writeKey(name, own)
}

func (c *Cluster) writeKey(name string, key crypto.Signer) error {
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return err
	}
	return os.WriteFile(c.path("pki", name+".key"), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), 0o600)
}
